"""Prox-and-clip over all layers in one launch, for CUDA. Optional.

Every layer's parameters stay where they are: the kernel finds them by a table of addresses, made once per set of
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["prox_and_clip"]

_BLOCK = 512


@triton.jit
def _prox_and_clip(table, thresholds, like, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # compiled by triton
    layer = tl.program_id(0)
    row = table + 3 * layer
    kind = tl.pointer_type(like.dtype.element_ty)
    widths, locations = tl.load(row).to(kind), tl.load(row + 1).to(kind)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(row + 2)
    step = tl.load(thresholds + layer).to(like.dtype.element_ty)
    w = tl.load(widths + i, mask=inside, other=0.0)
    shrunk = w - tl.where(w <= 0, tl.maximum(step, 0.0), step)  # a negative step grows live widths only
    shrunk = tl.where(shrunk > 1, 1.0, tl.where(shrunk < 0, 0.0, shrunk))  # NaN stays NaN
    tl.store(widths + i, shrunk, mask=inside)
    at = tl.load(locations + i, mask=inside, other=0.0)
    wide = at if at.dtype == tl.float64 else at.to(tl.float32)  # no floor of 16 bits
    tl.store(locations + i, (wide - tl.floor(wide)).to(at.dtype), mask=inside)


@lru_cache(maxsize=8)
def _table(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """(L, 3) int64 addresses of widths and locations, and number of their elements."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def prox_and_clip(widths: Sequence[Tensor], locations: Sequence[Tensor], thresholds: Tensor) -> None:
    """As :func:`~gblr_plugin.learning.proximal.prox_and_clip_`, for contiguous parameters of one dtype."""
    sizes = [width.numel() for width in widths]
    rows = zip(widths, locations, sizes, strict=True)
    table = _table(tuple((w.data_ptr(), at.data_ptr(), size) for w, at, size in rows), thresholds.device)
    grid = len(sizes), triton.cdiv(max(sizes), _BLOCK)
    with torch.cuda.device_of(widths[0]):
        _prox_and_clip[grid](table, thresholds.contiguous(), widths[0], BLOCK=_BLOCK)
