"""What the reports of ``gblr run``, ``compare`` and ``search`` share: how a task is judged, and their form as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

__all__ = ["TaskReport", "mean_and_spread"]

R = TypeVar("R", bound="TaskReport")
_VERSION = 1


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (max - min) / 2 over seeds; with three seeds a standard deviation would say more than is known."""
    return sum(values) / len(values), (max(values) - min(values)) / 2


@dataclass(frozen=True)
class TaskReport:
    """What was found about a task; subclasses add the entries that were found.

    Args:
        task: Name of the task.
        metric: Name of the figure by which it is judged.
        higher_is_better: Its direction.
    """

    task: str
    metric: str
    higher_is_better: bool

    FORMAT: ClassVar[str]
    """Name of the format in JSON."""
    ENTRIES: ClassVar[tuple[str, Any]]
    """Name of the field of entries, and their class, which has ``from_dict``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": self.FORMAT, "version": _VERSION, **asdict(self)}

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls: type[R], values: dict[str, Any]) -> R:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: If the values are not of this format.
        """
        if values.get("format") != cls.FORMAT or values.get("version") != _VERSION:
            raise ValueError(f"not a {cls.FORMAT}")
        known = {field.name: values[field.name] for field in fields(cls)}
        name, kind = cls.ENTRIES
        return cls(**{**known, name: [kind.from_dict(entry) for entry in known[name]]})

    @property
    def direction(self) -> str:
        """``"higher is better"`` or the contrary."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"


class Entry:
    """An entry of a report: a dataclass of plain values."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Inverse of ``dataclasses.asdict``."""
        return cls(**values)
