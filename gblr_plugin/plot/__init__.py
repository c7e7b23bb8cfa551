"""Figures for notebooks and papers, by matplotlib: a structure, how it was learned, and accuracy against cost."""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401  # for the message
except ImportError as error:
    raise ImportError("gblr_plugin.plot needs matplotlib: pip install 'gblr-plugin[plot]'") from error

from .comparison import comparison
from .curves import curves
from .pareto import pareto
from .search import search
from .structure import structure

__all__ = ["comparison", "curves", "pareto", "search", "structure"]
