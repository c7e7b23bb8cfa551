"""Structure families by name."""

from __future__ import annotations

from importlib import import_module

from ..errors import ConfigError
from ..utils.validation import did_you_mean
from .base import FamilyMatrix

__all__ = ["get", "names"]

# Name -> module and class. Imported on first use, so that choosing a rival does not import all of them.
_FAMILIES = {
    "gblr": ("gblr", "Gblr"),
    "low_rank": ("low_rank", "LowRank"),
    "alds": ("alds", "Alds"),
    "monarch": ("monarch", "Monarch"),
    "block_low_rank": ("block_low_rank", "BlockLowRank"),
    "block_sparse": ("block_sparse", "BlockSparse"),
    "block_diagonal": ("block_diagonal", "BlockDiagonal"),
    "blast": ("blast", "Blast"),
    "tucker2": ("tucker2", "Tucker2"),
}


def names() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(_FAMILIES)


def get(name: str) -> type[FamilyMatrix]:
    """The class of a family.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _FAMILIES:
        hint = did_you_mean(name, _FAMILIES)
        raise ConfigError(f"family: no structure named {name!r}; allowed are {', '.join(_FAMILIES)}{hint}")
    module, kind = _FAMILIES[name]
    family: type[FamilyMatrix] = getattr(import_module(f".{module}", __package__), kind)
    return family
