"""Which compiled kernels serve masks and their gradients: numba's on the CPU, triton's on CUDA, or none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["mask_kernels"]

_WORTH = 1 << 15  # elements of all masks from which on a kernel pays on the CPU; importing numba takes a second
_PLAIN = Tensor, torch.nn.Parameter


@lru_cache
def _module(kind: str) -> Any:
    """The kernels of a device type, imported on first use, or ``None``."""
    needed = {"cpu": "numba", "cuda": "triton"}.get(kind)
    if needed is None or find_spec(needed) is None:
        return None
    return import_module(f".{needed}_masks", __package__)


def mask_kernels(tables: Tensor, size: int, others: Sequence[Tensor | None]) -> Any:
    """Compiled kernels for masks of ``size`` elements together, or ``None`` for torch operations.

    Args:
        tables: (2, 3N) from :func:`~gblr_plugin.mask.mask_tables`.
        size: K * N.
        others: Factors and upstream gradients. On the CPU they must have the tables' dtype.

    Returns:
        A module with ``window_differences``, ``edge_sums`` and ``masked_gradients``.
    """
    kind = tables.device.type
    if torch.compiler.is_compiling() or (kind == "cpu" and size < _WORTH):
        return None
    given = [tables, *(other for other in others if other is not None)]
    if any(type(part) not in _PLAIN or part.device.type != kind for part in given):
        return None  # fake and traced tensors have no memory
    if kind == "cpu" and any(part.dtype != tables.dtype for part in given):
        return None
    return _module(kind)
