"""Ranges of settings, declared once, in the annotations of a dataclass, and checked where one is made.

``lr: Annotated[float, Interval("(0, inf)")] = 1e-3`` is what :func:`check_declared` refuses by, and what a JSON schema
of the settings says.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from ..errors import ConfigError
from .validation import check_choice, check_count, check_number, in_interval, is_whole

__all__ = ["Integer", "Interval", "OneOf", "bounds_of", "check_declared"]


@dataclass(frozen=True)
class Interval:
    """A number in an interval.

    Args:
        text: Such as ``"[0, 1)"`` or ``"(0, inf)"``.
        meaning: What the number is, for messages: ``"relative FLOPs"``.
    """

    text: str
    meaning: str = ""

    def check(self, what: str, value: object) -> None:
        """Refuse a value outside."""
        if self.meaning and not in_interval(value, self.text):
            raise ConfigError(f"{what} must be {self.meaning} in {self.text}, got {value!r}")
        check_number(what, value, self.text)

    def to_schema(self) -> dict[str, float]:
        """The keys of a JSON schema."""
        low, high = (float(end) for end in self.text[1:-1].split(","))
        bounds = {"minimum" if self.text[0] == "[" else "exclusiveMinimum": low}
        if high != float("inf"):
            bounds["maximum" if self.text[-1] == "]" else "exclusiveMaximum"] = high
        return bounds


@dataclass(frozen=True)
class Integer:
    """A whole number.

    Args:
        least: The smallest.
        most: The largest, if there is one.
    """

    least: int
    most: int | None = None

    def check(self, what: str, value: object) -> None:
        """Refuse a value outside."""
        if self.most is not None and not (is_whole(value) and self.least <= value <= self.most):
            raise ConfigError(f"{what} must be a whole number from {self.least} to {self.most}, got {value!r}")
        check_count(what, value, self.least)

    def to_schema(self) -> dict[str, int]:
        """The keys of a JSON schema."""
        return {"minimum": self.least} | ({} if self.most is None else {"maximum": self.most})


@dataclass(frozen=True)
class OneOf:
    """One of some names.

    Args:
        names: The names.
    """

    names: tuple[str, ...]

    def check(self, what: str, value: object) -> None:
        """Refuse any other value."""
        check_choice(what, value, self.names)

    def to_schema(self) -> dict[str, list[str]]:
        """The keys of a JSON schema."""
        return {"enum": list(self.names)}


Bound = Interval | Integer | OneOf


def bounds_of(hint: Any) -> list[Bound]:
    """The bounds in an annotation itself, not those of what it holds."""
    if typing.get_origin(hint) is not Annotated:
        return []
    return [bound for bound in typing.get_args(hint)[1:] if isinstance(bound, Interval | Integer | OneOf)]


def check_declared(settings: Any) -> None:
    """Check the fields of a dataclass by the bounds in their annotations.

    Raises:
        ConfigError: Beginning with the field's name.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        for bound, value in _bounded(hint, getattr(settings, name)):
            bound.check(name, value)


def _bounded(hint: Any, value: Any) -> Iterator[tuple[Bound, Any]]:
    """Each bound, and the value that it is about; the entries of a list one by one."""
    for bound in bounds_of(hint):
        yield bound, value
    inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if typing.get_origin(hint) is Annotated or value is None or not inner:
        return
    if typing.get_origin(hint) is list:
        for entry in value:
            yield from _bounded(inner[0], entry)
    elif typing.get_origin(hint) is not dict:  # a union with None
        yield from _bounded(inner[0], value)
