"""Structure families: GBLR and its rivals behind one protocol, chosen by name.

One file a family. Each is a frozen matrix (:class:`FamilyMatrix`) with a one-shot projection, its product and its cost,
counted as GBLR counts. :func:`gblr_plugin.prepare` puts a family's layers into a model.
"""

from __future__ import annotations

from .base import FamilyMatrix
from .layers import FamilyConv1d, FamilyConv2d, FamilyLayer, FamilyLinear
from .registry import get, names, register_family

__all__ = [
    "FamilyConv1d",
    "FamilyConv2d",
    "FamilyLayer",
    "FamilyLinear",
    "FamilyMatrix",
    "get",
    "names",
    "register_family",
]
