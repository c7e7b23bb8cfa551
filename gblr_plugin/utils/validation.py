"""Checks of arguments that many functions take: each raises a ConfigError of one line, what it is and what is allowed.

The first argument of every check names the argument for the message, with whoever takes it: ``"decompose: budget"``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "check_choice",
    "check_count",
    "check_flag",
    "check_number",
    "check_row_splits",
    "check_share",
    "check_tile",
    "check_weight",
    "describe_interval",
    "did_you_mean",
    "in_interval",
    "is_number",
    "is_whole",
]


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """``"; did you mean 'svd'?"`` with the nearest of the known words, or an empty text where none is near."""
    by_lower = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1) if isinstance(word, str) else []
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(what: str, value: object, known: Iterable[object]) -> None:
    """Refuse a value that is none of the known ones, with the nearest of them."""
    names = list(known)
    if not isinstance(value, str | None) or value not in names:
        allowed = ", ".join(map(str, names))
        raise ConfigError(f"{what} must be one of {allowed}, got {value!r}{did_you_mean(value, names)}")


def check_share(what: str, value: object, kind: str = "a number") -> None:
    """Refuse anything but a number above 0 and at most 1; ``kind`` says in the message what the number means."""
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{what} must be {kind} in (0, 1], got {value!r}")


def in_interval(value: object, interval: str) -> bool:
    """Whether a value is a finite number in an interval, written as ``"[0, 1)"`` or ``"(0, inf)"``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if not is_number(value) or not low <= value <= high:
        return False
    return not (value == low and interval[0] == "(") and not (value == high and interval[-1] == ")")


def describe_interval(interval: str) -> str:
    """An interval in the words of a message: ``"a number in [0, 1)"``, ``"a finite number above 0"``."""
    if not interval.endswith("inf)"):
        return f"a number in {interval}"
    return f"a finite number {'above' if interval[0] == '(' else 'of at least'} {interval[1:].split(',')[0]}"


def check_number(what: str, value: object, interval: str) -> None:
    """Refuse anything but a number in an interval, written as ``"[0, 1)"`` or ``"(0, inf)"``."""
    if not in_interval(value, interval):
        allowed = "positive" if interval == "(0, inf)" else describe_interval(interval)
        raise ConfigError(f"{what} must be {allowed}, got {value!r}")


def check_count(what: str, value: object, least: int = 1) -> None:
    """Refuse anything but an int of at least ``least``."""
    if not is_whole(value) or value < least:
        raise ConfigError(f"{what} must be a whole number of at least {least}, got {value!r}")


def check_flag(what: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, got {value!r}")


def check_tile(what: str, value: Any) -> tuple[int, int]:
    """The tile (rows, columns) that an argument means: one positive int for both axes, or a pair of them.

    Raises:
        ConfigError: For anything else.
    """
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(is_whole(tile) and tile >= 1 for tile in pair):
        raise ConfigError(f"{what} must be a positive int or a pair (rows, columns) of them, got {value!r}")
    return pair[0], pair[1]


def check_row_splits(what: str, value: object, rows: int) -> None:
    """Refuse anything but an int that divides the number of rows."""
    if not is_whole(value) or value < 1 or rows % value:
        raise ConfigError(f"{what} must be a positive divisor of the {rows} rows, got {value!r}")


def check_weight(what: str, weight: object) -> None:
    """Refuse anything but a finite, non-empty 2-d floating-point tensor of half precision or more."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point or not weight.numel():
        given = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"{what} must be a non-empty 2-d floating-point tensor of rows and columns, got {given}")
    if weight.dtype.itemsize < 2:
        raise ConfigError(f"{what} must have half precision or more, got {weight.dtype}")
    if weight.is_meta:
        raise ConfigError(f"{what} is on the meta device, it has no values to approximate")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{what} holds NaN or infinite values")
