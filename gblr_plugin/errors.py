"""Errors of gblr_plugin: each message says what is wrong, where, and what is allowed."""

from __future__ import annotations

__all__ = ["BudgetError", "ConfigError", "GBLRError"]


class GBLRError(Exception):
    """Base class of the errors raised by gblr_plugin."""


class ConfigError(GBLRError, ValueError):
    """A setting, budget, layer name or input that cannot be used as given."""


class BudgetError(ConfigError):
    """A budget that does not pay for the smallest matrix of a structure."""
