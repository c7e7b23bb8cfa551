"""Products of masked factors that skip what the masks make negligible: axis blocks with lists of active components.

A component whose interval does not meet a block of an axis contributes nothing there. Each block multiplies only the
components on its list, forward and backward. For exact boxcars of a frozen structure nothing is lost. For smooth masks,
mask values below ``TOLERANCE`` are taken for zero, and so is the part of the width and location gradients that is weighted
by less than ``SLOPE_TOLERANCE`` of the steepest edge weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mask import mask_tables

__all__ = ["SLOPE_TOLERANCE", "TOLERANCE", "Block", "active_blocks", "block_dense", "block_linear", "mask_reach"]

TOLERANCE = 1e-5
"""Largest mask value that may be taken for zero."""

SLOPE_TOLERANCE = 1e-3
"""Largest weight in width and location gradients, over the largest one, that may be taken for zero."""


@lru_cache(maxsize=32)
def mask_reach(n: int, sigma: float | None) -> int:
    """Samples beyond its interval from which on a mask and its gradients are negligible.

    Args:
        n: Axis length N.
        sigma: Smoothness; ``None`` for the exact boxcar, whose straight-through gradients reach everywhere.

    Returns:
        In [1, N]; N where no bound holds. A mask is its boxcar plus one term per edge, read from the tables.
    """
    if sigma is None:
        return n
    smooth, exact = mask_tables(n, sigma, torch.float64), mask_tables(n, None, torch.float64)
    deviation = smooth[0, -n:] - exact[0, -n:]
    deviation = (deviation - deviation[n // 2]).abs()  # the terms' common constant cancels between the edges
    slope = smooth[1, :n].abs()
    distance = torch.arange(n)
    distance = torch.minimum(distance, n - distance)
    beyond = distance[(deviation > TOLERANCE / 2) | (slope > SLOPE_TOLERANCE * slope.max())]
    reach = int(beyond.max()) + 2
    return reach if 2 * reach < n else n


@dataclass(frozen=True)
class Block:
    """A range of one axis and the components that are active in it.

    Args:
        components: (A,) int64 indices of the active components, ascending.
        first: First index of the range, on the factor's axis.
        stop: One past its last index.
        offset: Where ``first`` lies on the matrix's axis (row splits are stacked).
    """

    components: Tensor
    first: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Entries of the factor that the block multiplies."""
        return len(self.components) * (self.stop - self.first)


def active_blocks(width: Tensor, start: Tensor, length: int, reach: int, skip: Tensor, splits: int = 1) -> list[Block]:
    """Cut an axis into blocks and list the components that are active in each.

    Args:
        width: (K,) int64 interval widths.
        start: (K,) int64 first indices.
        length: Axis length.
        reach: Samples by which masks exceed their intervals, see :func:`mask_reach`; 0 for frozen boxcars.
        skip: (K,) bool, components to leave out.
        splits: Number of equal runs of components, each with an axis of its own.

    Returns:
        Blocks in the order of the matrix's axis; together they cover it.
    """
    size = min(max(64, length // 8), 192)
    edges = [*range(0, length, size), length]
    first = torch.tensor(edges[:-1], device=width.device)[:, None]
    stop = torch.tensor(edges[1:], device=width.device)[:, None]
    whole = (width + 2 * reach).clamp(max=length)
    begin = start - reach
    # Two cyclic ranges meet if one begins inside the other.
    active = ((first - begin) % length < whole) | ((begin - first) % length < stop - first)
    active &= (whole > 0) & ~skip
    per_split = active.view(len(edges) - 1, splits, -1).transpose(0, 1)  # (splits, blocks, K / splits)
    counts = per_split.sum(-1).flatten().tolist()
    split, _, local = per_split.nonzero(as_tuple=True)
    lists = (local + split * per_split.shape[-1]).split(counts)
    return [
        Block(lists[s * (len(edges) - 1) + b], edges[b], edges[b + 1], s * length + edges[b])
        for s in range(splits)
        for b in range(len(edges) - 1)
    ]


def _rows(factor: Tensor, block: Block) -> Tensor:
    return factor[:, block.first : block.stop].index_select(0, block.components)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rows: list[Block], cols: list[Block]
    ) -> Tensor:
        z = x.new_zeros(len(v), len(x))
        for block in cols:
            z.index_add_(0, block.components, _rows(v, block) @ x[:, block.offset : block.offset + block.stop - block.first].T)
        y = x.new_empty(len(x), rows[-1].offset + rows[-1].stop - rows[-1].first)
        for block in rows:
            out = y[:, block.offset : block.offset + block.stop - block.first]
            torch.mm(z.index_select(0, block.components).T, _rows(u, block), out=out)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, u, v, z)
        ctx.rows, ctx.cols, ctx.has_bias = rows, cols, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, v, z = ctx.saved_tensors
        to_u, to_v, to_x = torch.zeros_like(u), torch.zeros_like(v), torch.empty_like(x)
        to_z = torch.zeros_like(z)
        for block in ctx.rows:
            part = grad[:, block.offset : block.offset + block.stop - block.first]
            to_u[:, block.first : block.stop].index_copy_(0, block.components, z.index_select(0, block.components) @ part)
            to_z.index_add_(0, block.components, _rows(u, block) @ part.T)
        for block in ctx.cols:
            here = slice(block.first, block.stop)
            upstream = to_z.index_select(0, block.components)
            to_v[:, here].index_copy_(0, block.components, upstream @ x[:, here])
            if ctx.needs_input_grad[0]:
                torch.mm(upstream.T, _rows(v, block), out=to_x[:, here])
        to_bias = grad.sum(0) if ctx.has_bias else None
        return (to_x if ctx.needs_input_grad[0] else None), to_u, to_v, to_bias, None, None


class _BlockDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, rows: list[Block]) -> Tensor:
        weight = u.new_empty(rows[-1].offset + rows[-1].stop - rows[-1].first, v.shape[1])
        for block in rows:
            out = weight[block.offset : block.offset + block.stop - block.first]
            torch.mm(_rows(u, block).T, v.index_select(0, block.components), out=out)
        ctx.save_for_backward(u, v)
        ctx.rows = rows
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, v = ctx.saved_tensors
        to_u, to_v = torch.zeros_like(u), torch.zeros_like(v)
        for block in ctx.rows:
            part = grad[block.offset : block.offset + block.stop - block.first]
            v_rows = v.index_select(0, block.components)
            to_u[:, block.first : block.stop].index_copy_(0, block.components, v_rows @ part.T)
            to_v.index_add_(0, block.components, _rows(u, block) @ part)
        return to_u, to_v, None


def block_linear(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rows: Sequence[Block], cols: Sequence[Block]
) -> Tensor:
    """``x W^T + bias`` for W of masked factors, skipping inactive blocks; differentiable once.

    Args:
        x: (..., n).
        u: (K, m / s) masked row factors, in the dtype of ``x``.
        v: (K, n) masked column factors.
        bias: (m,) or ``None``.
        rows: Blocks of the rows.
        cols: Blocks of the columns (one split: every component reads the same input).

    Returns:
        (..., m). Costs ``sum of block sizes`` multiply-adds per input vector.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = cast(Tensor, _BlockLinear.apply(flat, u, v, bias, rows, cols))
    return y.view(*x.shape[:-1], y.shape[-1])


def block_dense(u: Tensor, v: Tensor, rows: Sequence[Block]) -> Tensor:
    """The (m, n) matrix of masked factors, skipping inactive row blocks; differentiable once."""
    return cast(Tensor, _BlockDense.apply(u, v, rows))
