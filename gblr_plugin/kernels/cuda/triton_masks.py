"""Masks, masked factors and their gradients in triton: one launch each, no mask or mask gradient in memory. Optional.

The functions are those of ``numba_masks``, for CUDA. Sums run over a row in one program, in a fixed order: equal inputs
give equal results. Nothing synchronises, and a CUDA graph can hold the calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["edge_sums", "masked_gradients", "window_differences"]

_WIDEST = 1024  # entries of a row that one program holds at a time


@triton.jit
def _differences(  # type: ignore[no-untyped-def]  # compiled by triton
    tables, first, last, factor, out, n, row_stride, column_stride, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a, b = tl.load(first + k), tl.load(last + k)
    value = tl.load(tables + a + i, mask=inside, other=0.0) - tl.load(tables + b + i, mask=inside, other=0.0)
    if FACTOR:
        value *= tl.load(factor + k * row_stride + i.to(tl.int64) * column_stride, mask=inside, other=0.0)
    tl.store(out + k * n + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]  # compiled by triton
    tables,
    first,
    last,
    upstream,
    factor,
    out,
    sums,
    num,
    n,
    grad_row,
    grad_column,
    factor_row,
    factor_column,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    a, b = tl.load(first + k), tl.load(last + k)
    slope = tables + 3 * n
    trailing = tl.zeros((BLOCK,), tables.dtype.element_ty)
    leading = tl.zeros((BLOCK,), tables.dtype.element_ty)
    for at in range(0, n, BLOCK):
        i = at + tl.arange(0, BLOCK)
        inside = i < n
        wide = i.to(tl.int64)
        g = tl.load(upstream + k * grad_row + wide * grad_column, mask=inside, other=0.0).to(tables.dtype.element_ty)
        if FACTOR:
            mask = tl.load(tables + a + i, mask=inside, other=0.0) - tl.load(tables + b + i, mask=inside, other=0.0)
            tl.store(out + k * n + i, (mask * g).to(out.dtype.element_ty), mask=inside)
            g *= tl.load(factor + k * factor_row + wide * factor_column, mask=inside, other=0.0).to(
                tables.dtype.element_ty
            )
        trailing += g * tl.load(slope + b + i, mask=inside, other=0.0)
        leading += g * tl.load(slope + a + i, mask=inside, other=0.0)
    tl.store(sums + k, tl.sum(trailing, 0))
    tl.store(sums + num + k, tl.sum(leading, 0))


def _block(n: int) -> tuple[int, int]:
    """Entries per program and warps for rows of ``n``."""
    block = min(max(triton.next_power_of_2(n), 64), _WIDEST)
    return block, max(block // 128, 1)


def window_differences(tables: Tensor, first: Tensor, last: Tensor, factor: Tensor | None) -> Tensor:
    """As in ``numba_masks``, for contiguous tables and a factor of any floating-point dtype, which the result has."""
    num, n = len(first), tables.shape[1] // 3
    out = tables.new_empty(num, n, dtype=tables.dtype if factor is None else factor.dtype)
    if num:
        block, warps = _block(n)
        given = tables if factor is None else factor
        with torch.cuda.device_of(tables):
            _differences[(num, triton.cdiv(n, block))](
                tables,
                first,
                last,
                given,
                out,
                n,
                *given.stride(),
                FACTOR=factor is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return out


def _gradients(
    tables: Tensor, first: Tensor, last: Tensor, upstream: Tensor, factor: Tensor | None, out: Tensor
) -> Tensor:
    num, n = upstream.shape
    sums = tables.new_empty(2, num)
    if num:
        block, warps = _block(n)
        given = upstream if factor is None else factor
        with torch.cuda.device_of(tables):
            _reduce[(num,)](
                tables,
                first,
                last,
                upstream,
                given,
                out,
                sums,
                num,
                n,
                *upstream.stride(),
                *given.stride(),
                FACTOR=factor is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return sums


def edge_sums(tables: Tensor, first: Tensor, last: Tensor, upstream: Tensor) -> Tensor:
    """(2, K) sums of ``upstream`` (K, N) against the width derivative at the trailing and at the leading edge."""
    return _gradients(tables, first, last, upstream, None, upstream)


def masked_gradients(
    tables: Tensor, first: Tensor, last: Tensor, upstream: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """(K, N) gradient of a masked factor in the factor, and its (2, K) sums as of :func:`edge_sums`, in one launch."""
    out = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
    return out, _gradients(tables, first, last, upstream, factor, out)
