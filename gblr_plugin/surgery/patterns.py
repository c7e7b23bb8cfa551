"""Patterns by which users name layers: full names, glob patterns over full names, and types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ..errors import ConfigError
from ..utils.validation import did_you_mean

__all__ = ["as_patterns", "check_used", "matches", "value_of"]

T = TypeVar("T")


def as_patterns(what: str, given: Iterable[str | type[nn.Module]]) -> list[str]:
    """Read patterns as strings; a module type becomes its name.

    Args:
        what: The argument that holds them, for messages.
        given: Full names, glob patterns, type names or module types.

    Raises:
        ConfigError: If it is one pattern and no list of them.
    """
    if isinstance(given, (str, type)):
        raise ConfigError(f"{what} is a list of names, glob patterns or types, not one of them")
    return [pattern if isinstance(pattern, str) else pattern.__name__ for pattern in given]


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Decide whether a pattern means a module.

    Args:
        pattern: A full name, a glob pattern over full names (``"blocks.*.mlp.*"``), or the name of the module's class
            or of one of its base classes, as ``isinstance`` sees them.
        name: Full name of the module in its model.
        module: The module.
    """
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(module).__mro__)


def check_used(what: str, patterns: Iterable[str], modules: Mapping[str, nn.Module], among: str) -> None:
    """Refuse a pattern that matches nothing.

    Args:
        what: The argument that holds the patterns.
        patterns: The patterns.
        modules: Modules by full name.
        among: What the modules are, for the message.

    Raises:
        ConfigError: With the nearest name.
    """
    for pattern in patterns:
        if not any(matches(pattern, name, module) for name, module in modules.items()):
            hint = did_you_mean(pattern, modules)
            raise ConfigError(f"{what}: pattern {pattern!r} matches no {among}{hint}")


def value_of(table: T | Mapping[str, T], name: str, module: nn.Module, default: T) -> T:
    """Look a module's value up: one value is for all, a table has it by patterns, of which the first match counts."""
    if not isinstance(table, Mapping):
        return table
    return next((value for pattern, value in table.items() if matches(pattern, name, module)), default)
