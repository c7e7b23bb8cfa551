"""Structured approximations of dense matrices: closed forms and interval pursuit.

One file a method; all solve the same :class:`~gblr_plugin.decomposition.problem.Problem`.
"""

from __future__ import annotations

from .api import METHODS, decompose, initialise

__all__ = ["METHODS", "decompose", "initialise"]
