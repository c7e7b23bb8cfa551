"""Products of masked factors that skip what the masks make negligible: axis blocks with lists of active components.

A component whose interval does not meet a block of an axis contributes nothing there. Each block multiplies only the
components on its list, forward and backward. For exact boxcars of a frozen structure nothing is lost. For smooth masks,
mask values below ``TOLERANCE`` are taken for zero, and so is the part of the width and location gradients that is
weighted by less than ``SLOPE_TOLERANCE`` of the steepest edge weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.optional import mask_kernels
from ..matrix.gaudi_mask import mask_tables

__all__ = [
    "SLOPE_TOLERANCE",
    "TOLERANCE",
    "Block",
    "MaskedAxis",
    "active_blocks",
    "block_dense",
    "block_linear",
    "mask_reach",
]

TOLERANCE = 1e-5
"""Largest mask value that may be taken for zero."""

SLOPE_TOLERANCE = 1e-3
"""Largest weight in width and location gradients, over the largest one, that may be taken for zero."""

_POSITIONS = 512  # input vectors taken together: their (K, 512) codes stay in the cache


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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class MaskedAxis:
    """One axis of a layer: its blocks, and what makes the masks of its components.

    Args:
        blocks: From :func:`active_blocks`.
        tables: (2, 3N) from :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`.
        width: (K,) int64 interval widths.
        start: (K,) int64 first indices.
    """

    blocks: list[Block]
    tables: Tensor
    width: Tensor
    start: Tensor

    @cached_property
    def size(self) -> int:
        """Factor entries that all blocks multiply."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """Components of all blocks, (sum A,) int64, and (blocks, 3) int64 first index, stop and A of each."""
        table = torch.tensor([(block.first, block.stop, len(block.components)) for block in self.blocks])
        return torch.cat([block.components for block in self.blocks]), table

    def views(self, flat: Tensor) -> list[Tensor]:
        """The (A, B) entries of each block in a (size,) buffer that holds them one after another."""
        parts = flat.split([block.size for block in self.blocks])
        return [part.view(-1, block.stop - block.first) for part, block in zip(parts, self.blocks, strict=True)]

    def _windows(self, table: Tensor, block: Block, at: Tensor) -> Tensor:
        """(A, B) table entries of a block's range for intervals that end or begin ``at``."""
        n, size = table.shape[0] // 3, block.stop - block.first
        view = table.as_strided((3 * n - size + 1, size), (1, 1), table.storage_offset())
        return view.index_select(0, (2 * n + block.first) - at.index_select(0, block.components))

    def mask(self, block: Block) -> Tensor:
        """(A, B) mask values of a block."""
        prefix = self.tables[0]
        return self._windows(prefix, block, self.start).sub_(self._windows(prefix, block, self.start + self.width))

    def edge_sums(self, block: Block, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) sums of ``upstream`` (A, B) against the width derivative at the trailing and at the leading edge."""
        slope = self.tables[1]
        trailing = self._windows(slope, block, self.start + self.width).mul_(upstream).sum(1)
        return trailing, self._windows(slope, block, self.start).mul_(upstream).sum(1)


def _rows(factor: Tensor, block: Block) -> Tensor:
    return factor[:, block.first : block.stop].index_select(0, block.components)


def _along(tensor: Tensor, block: Block) -> Tensor:
    """Columns of (positions, axis) that a block covers."""
    return tensor[:, block.offset : block.offset + block.stop - block.first]


class _Side:
    """One factor by blocks: its masked entries, and the gradients of the factor and of its widths and locations."""

    def __init__(self, factor: Tensor, axis: MaskedAxis, dtype: torch.dtype) -> None:
        self.axis, self.factor = axis, factor
        kernels = self._kernels(factor)
        if kernels is None:
            masked = [axis.mask(block).mul_(_rows(factor, block)) for block in axis.blocks]
        else:
            flat = kernels.block_entries(axis.tables, *axis.lists, axis.width, axis.start, factor, axis.size)
            masked = axis.views(flat)
        self.masked = [part.to(dtype) for part in masked]

    def _kernels(self, *others: Tensor) -> Any:
        on_cpu = self.factor.device.type == "cpu"
        return mask_kernels(self.axis.tables, self.factor.numel(), others) if on_cpu else None

    def gradients(self, upstream: Tensor, with_edges: bool) -> tuple[Tensor, Tensor | None]:
        """(K, N) gradient of the factor and (2, K) sums at trailing and leading edges, from the (size,) of entries."""
        axis, factor = self.axis, self.factor
        kernels = self._kernels(factor, upstream)
        if kernels is not None:
            both = axis.tables, *axis.lists, axis.width, axis.start, factor, upstream
            gradient, edges = kernels.block_gradients(*both)
            return gradient, edges if with_edges else None
        gradient = torch.zeros_like(factor)
        edges = torch.zeros(2, len(factor), dtype=axis.tables.dtype, device=factor.device)
        for block, grad in zip(axis.blocks, axis.views(upstream), strict=True):
            here = gradient[:, block.first : block.stop]
            here.index_copy_(0, block.components, (grad * axis.mask(block)).to(here.dtype))
            if with_edges:
                sums = axis.edge_sums(block, (grad * _rows(factor, block)).to(axis.tables.dtype))
                edges.index_add_(1, block.components, torch.stack(sums))
        return gradient, edges if with_edges else None


def _set_or_add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total = left @ right`` the first time, ``+=`` from then on; sums in lower precision are kept in float32."""
    if total.dtype != left.dtype:
        product = left @ right
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        widths: Tensor,
        locations: Tensor,
        bias: Tensor | None,
        rows: MaskedAxis,
        cols: MaskedAxis,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        row_side, col_side = _Side(u, rows, x.dtype), _Side(v, cols, x.dtype)
        y = x.new_empty(len(x), rows.blocks[-1].offset + rows.blocks[-1].stop - rows.blocks[-1].first)
        codes = []
        for x_part, y_part in zip(x.split(_POSITIONS), y.split(_POSITIONS), strict=True):
            z = torch.zeros(len(v), len(x_part), dtype=wide, device=x.device)
            for block, factor in zip(cols.blocks, col_side.masked, strict=True):
                z.index_add_(0, block.components, (factor @ _along(x_part, block).T).to(wide))
            for block, factor in zip(rows.blocks, row_side.masked, strict=True):
                torch.mm(z.index_select(0, block.components).T.to(x.dtype), factor, out=_along(y_part, block))
            codes.append(z)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, u, v, rows.tables, cols.tables, *codes)
        ctx.axes, ctx.bias_dtype, ctx.structure_dtype = (rows, cols), None if bias is None else bias.dtype, widths.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, v, _, _, *codes = ctx.saved_tensors  # the tables too: an error where sigma has changed meanwhile
        rows, cols = ctx.axes
        row_side, col_side = _Side(u, rows, x.dtype), _Side(v, cols, x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        to_rows, to_cols = (torch.empty(axis.size, dtype=wide, device=x.device) for axis in (rows, cols))
        row_totals, col_totals = rows.views(to_rows), cols.views(to_cols)
        to_x = torch.empty_like(x)
        parts = zip(x.split(_POSITIONS), grad.split(_POSITIONS), to_x.split(_POSITIONS), codes, strict=True)
        for number, (x_part, grad_part, to_x_part, z) in enumerate(parts):
            to_z = torch.zeros_like(z)
            for block, factor, total in zip(rows.blocks, row_side.masked, row_totals, strict=True):
                behind = _along(grad_part, block)
                _set_or_add_product(total, z.index_select(0, block.components).to(x.dtype), behind, number == 0)
                to_z.index_add_(0, block.components, (factor @ behind.T).to(wide))
            for block, factor, total in zip(cols.blocks, col_side.masked, col_totals, strict=True):
                behind = to_z.index_select(0, block.components).to(x.dtype)
                _set_or_add_product(total, behind, _along(x_part, block), number == 0)
                if ctx.needs_input_grad[0]:
                    torch.mm(behind.T, factor, out=_along(to_x_part, block))
        with_edges = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        to_u, row_edges = row_side.gradients(to_rows, with_edges)
        to_v, col_edges = col_side.gradients(to_cols, with_edges)
        to_widths = to_locations = None
        if row_edges is not None and col_edges is not None:
            trailing, leading = torch.stack([row_edges, col_edges], dim=1).to(ctx.structure_dtype)
            to_widths, to_locations = trailing, trailing - leading
        to_bias = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
        return (to_x if ctx.needs_input_grad[0] else None), to_u, to_v, to_widths, to_locations, to_bias, None, None


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
    x: Tensor,
    u: Tensor,
    v: Tensor,
    widths: Tensor,
    locations: Tensor,
    bias: Tensor | None,
    rows: MaskedAxis,
    cols: MaskedAxis,
) -> Tensor:
    """``x W^T + bias`` for W of factors under their masks, skipping inactive blocks; differentiable once.

    Args:
        x: (..., n); its dtype is that of the products.
        u: (K, m / s) row factors, not yet masked.
        v: (K, n) column factors.
        widths: (2, K) parameter that receives the gradient; the masks are those of ``rows`` and ``cols``.
        locations: (2, K) likewise.
        bias: (m,) or ``None``.
        rows: The row axis.
        cols: The column axis (one split: every component reads the same input).

    Returns:
        (..., m) in the dtype of ``x``. Costs ``rows.size + cols.size`` multiply-adds per input vector; masks are made,
        and their gradients reduced, on active blocks only.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = cast(Tensor, _BlockLinear.apply(flat, u, v, widths, locations, bias, rows, cols))  # type: ignore[no-untyped-call]  # torch's, untyped
    return y.view(*x.shape[:-1], y.shape[-1])


def block_dense(u: Tensor, v: Tensor, rows: MaskedAxis) -> Tensor:
    """The (m, n) matrix of factors already masked, skipping inactive row blocks; differentiable once."""
    return cast(Tensor, _BlockDense.apply(u, v, rows.blocks))  # type: ignore[no-untyped-call]  # torch's, untyped
