"""Structure families: GBLR and its rivals behind one protocol, chosen by name.

One file a family. Each is a frozen matrix (:class:`FamilyMatrix`) with a one-shot projection, its product, its cost,
counted as GBLR counts, and a trainable layer.
"""

from __future__ import annotations

from typing import Any

from .base import FamilyMatrix
from .layers import FamilyConv1d, FamilyConv2d, FamilyLayer, FamilyLinear
from .registry import get, names

__all__ = [
    "FamilyConv1d",
    "FamilyConv2d",
    "FamilyLayer",
    "FamilyLinear",
    "FamilyMatrix",
    "convert",
    "get",
    "names",
    "replace",
]


def __getattr__(name: str) -> Any:
    if name in ("convert", "replace"):
        from ..surgery import families

        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
