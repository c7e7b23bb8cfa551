"""The description of a model besides its tensors: a small JSON text in the header of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ConfigError
from .container import Container

__all__ = ["FORMAT", "VERSION", "Header", "read_headers"]

FORMAT = "gblr-plugin"
VERSION = 2
_KEY = "gblr"


@dataclass
class Header:
    """The structure of a model's state.

    Args:
        weights: Record of each structured weight by name, see :mod:`~gblr_plugin.serialization.weights`; its plan is a
            number in ``plans``.
        plans: The different plans.
        families: Record of each family layer by name, see :mod:`~gblr_plugin.serialization.families`.
        torchao: What torchao's own safetensors support says of each quantized dense weight.
        full: Converted layers that are stored dense, see :mod:`gblr_plugin.layers.full`.
        tied: Names whose tensor is stored under another name.
    """

    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)
    families: dict[str, Any] = field(default_factory=dict)
    torchao: dict[str, str] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Texts for the header of a file; ``format`` is what Hugging Face asks for."""
        said = {key: value for key, value in asdict(self).items() if value}
        text = json.dumps({"format": FORMAT, "version": VERSION, **said}, separators=(",", ":"))
        return {"format": "pt", _KEY: text}

    def number_of(self, plan: dict[str, Any]) -> int:
        """Number of a plan, added if it is new."""
        if plan not in self.plans:
            self.plans.append(plan)
        return self.plans.index(plan)

    def record(self, name: str) -> dict[str, Any]:
        """A weight's record with its plan in full.

        Raises:
            ConfigError: If there is no such plan.
        """
        record = self.weights[name]
        number = record.get("plan")
        if not isinstance(number, int) or not 0 <= number < len(self.plans):
            raise ConfigError(f"the record of {name!r} is damaged")
        return {**record, "plan": self.plans[number]}

    def take(self, other: Header) -> None:
        """Add what another file of the same model says."""
        for name, record in other.weights.items():
            self.weights[name] = {**record, "plan": self.number_of(other.record(name)["plan"])}
        for key in ("families", "torchao", "tied"):
            getattr(self, key).update(getattr(other, key))
        self.full.extend(other.full)


def read_headers(containers: Iterable[Container], who: str = "load") -> Header:
    """What the files of one model say together.

    Raises:
        ConfigError: If one of them is not of this format, of a later version, or damaged.
    """
    merged = Header()
    for container in containers:
        path = container.path
        text = container.metadata.get(_KEY)
        if text is None:
            raise ConfigError(f"{who}: {path!r} is not a gblr_plugin model file")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{who}: {path!r} is damaged: its header is no JSON text") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ConfigError(f"{who}: {path!r} is not a gblr_plugin model file")
        version = values.pop("version", None)
        if version != VERSION:
            raise ConfigError(f"{who}: {path!r} has format version {version}, allowed is {VERSION}")
        if not _is_sound(values):
            raise ConfigError(f"{who}: {path!r} is damaged, or not a gblr_plugin model file")
        try:
            merged.take(Header(**values))
        except ConfigError as error:
            raise ConfigError(f"{who}: {path!r} is damaged: {error}") from error
    return merged


def _is_sound(values: Mapping[str, Any]) -> bool:
    like = vars(Header())
    if any(key not in like or type(value) is not type(like[key]) for key, value in values.items()):
        return False
    header = Header(**values)
    tables = (*header.weights.values(), *header.plans, *header.families.values())
    texts = (*header.torchao.values(), *header.full, *header.tied.values())
    return all(isinstance(table, dict) for table in tables) and all(isinstance(text, str) for text in texts)
