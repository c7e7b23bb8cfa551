"""Structure families by name: those of this package, registered ones, and those that installed packages bring.

A package brings a family by an entry point of the group ``gblr_plugin.families``, whose name is the family's and whose
value is its class.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata

from ..errors import ConfigError
from ..utils.validation import did_you_mean
from .base import FamilyMatrix

__all__ = ["GROUP", "get", "names", "register_family"]

GROUP = "gblr_plugin.families"
"""Group of the entry points."""

# Name -> module and class of this package. Imported on first use, so that choosing a rival does not import all of them.
_BUILT_IN = {
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
_REGISTERED: dict[str, type[FamilyMatrix]] = {}


@cache
def _installed() -> dict[str, metadata.EntryPoint]:
    """Entry points of other packages by name, without those that use the name of a family of this package."""
    return {point.name: point for point in metadata.entry_points(group=GROUP) if point.name not in _BUILT_IN}


def names() -> tuple[str, ...]:
    """Names of all families."""
    return tuple({**_BUILT_IN, **_installed(), **_REGISTERED})


def get(name: str) -> type[FamilyMatrix]:
    """The class of a family.

    Raises:
        ConfigError: If no family has that name, or the class that another package registers is no family.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _BUILT_IN:
        module, kind = _BUILT_IN[name]
        family: type[FamilyMatrix] = getattr(import_module(f".{module}", __package__), kind)
        return family
    if name not in _installed():
        known = names()
        hint = did_you_mean(name, known)
        raise ConfigError(f"family: no structure named {name!r}; allowed are {', '.join(known)}{hint}")
    point = _installed()[name]
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"family {name!r}: its entry point {point.value!r} cannot be imported: {error}") from error
    register_family(name, found)
    return _REGISTERED[name]


def register_family(name: str, family: type[FamilyMatrix]) -> None:
    """Make a family known by name, wherever a family is chosen by one.

    Args:
        name: Name of the family in configs.
        family: Its class, whose ``name`` is the same.

    Raises:
        ConfigError: If it is no family, has another name, or the name is that of another family.
    """
    if not (isinstance(family, type) and issubclass(family, FamilyMatrix)):
        raise ConfigError(f"family {name!r}: need a class derived from FamilyMatrix, got {family!r}")
    named = getattr(family, "name", None)
    if named != name:
        raise ConfigError(f"family {name!r}: its class calls itself {named!r}; both names must be the same")
    if name in _BUILT_IN or _REGISTERED.setdefault(name, family) is not family:
        raise ConfigError(f"family {name!r} is registered already")
