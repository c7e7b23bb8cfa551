"""Errors of gblr_plugin: each message says what is wrong, where, and what is allowed."""

from __future__ import annotations

__all__ = ["BudgetError", "ConfigError", "GBLRError", "first_line"]


class GBLRError(Exception):
    """Base class of the errors raised by gblr_plugin."""


class ConfigError(GBLRError, ValueError):
    """A setting, budget, layer name or input that cannot be used as given."""


class BudgetError(ConfigError):
    """A budget that is below the cost of the smallest matrix of a structure."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
