"""TensorBoard: the GBLR tab and its records.

The TensorBoard server imports this package to find the tab, so nothing is imported here until it is used: the server
needs neither torch nor a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {"structure_image": "..monitoring.pictures", "write_structure": ".summary"}

__all__ = ["structure_image", "write_structure"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
