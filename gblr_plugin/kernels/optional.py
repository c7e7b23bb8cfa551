"""The optional kernels of masks, proximal steps and decompositions: numba's on the CPU, Triton's on CUDA, or none.

Each function returns ``None`` where torch operations are to be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._compat import functorch_transform

__all__ = ["mask_kernels", "proximal_kernel", "solve_kernel", "span_kernel"]

_LEAST = 1 << 15  # elements from which on a kernel is used on the CPU: importing numba takes a second
_PLAIN = Tensor, torch.nn.Parameter


@lru_cache
def _module(package: str, name: str) -> Any:
    """A file of kernels, imported on first use, or ``None`` where the package that it needs is missing."""
    folder = {"numba": "cpu", "triton": "cuda"}[package]
    return None if find_spec(package) is None else import_module(f".{folder}.{package}_{name}", __package__)


def mask_kernels(tables: Tensor, size: int, others: Sequence[Tensor | None]) -> Any:
    """Kernels for masks of ``size`` elements together.

    Args:
        tables: (2, 3N) from :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`.
        size: K * N.
        others: Factors and upstream gradients. On the CPU they must have the tables' dtype.

    Returns:
        A module with ``window_differences``, ``edge_sums`` and ``masked_gradients``.
    """
    kind = tables.device.type
    if torch.compiler.is_compiling() or (kind == "cpu" and size < _LEAST) or kind not in ("cpu", "cuda"):
        return None
    given = [tables, *(other for other in others if other is not None)]
    # Fake and traced tensors, and those of function transforms, have no memory.
    if any(type(tensor) not in _PLAIN or tensor.device.type != kind for tensor in given):
        return None
    if functorch_transform() is not None:
        return None
    if kind == "cuda":
        return _module("triton", "masks")
    return None if any(tensor.dtype != tables.dtype for tensor in given) else _module("numba", "masks")


def proximal_kernel(parameters: Sequence[Tensor]) -> Any:
    """Prox-and-clip in one launch, for contiguous parameters of one dtype on CUDA."""
    like = parameters[0]
    if torch.compiler.is_compiling() or not like.is_cuda:
        return None
    if any(type(p) not in _PLAIN or p.dtype != like.dtype or not p.is_contiguous() for p in parameters):
        return None
    module = _module("triton", "proximal")
    return None if module is None else module.prox_and_clip


def solve_kernel(gram: Tensor, size: int) -> Any:
    """Least squares on submatrices of a (K, K) Gram matrix.

    Args:
        gram: Float32 or float64.
        size: K times the number of problems.
    """
    module = _on_cpu("solve", gram, size)
    return None if module is None else module.solve


def span_kernel(gains: Tensor) -> Any:
    """The best intervals of components by their (K, cells) gains."""
    module = _on_cpu("spans", gains, gains.numel())
    return None if module is None else module.best_spans


def _on_cpu(name: str, like: Tensor, size: int) -> Any:
    """Kernels of numba for a plain tensor on the CPU, where there is enough work."""
    if like.device.type != "cpu" or size < _LEAST or type(like) not in _PLAIN:
        return None
    return _module("numba", name)
