"""Products by masked factors that skip inactive blocks: each block multiplies only the components on its list."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.optional import mask_kernels
from .axis_blocks import Block, MaskedAxis

__all__ = ["block_dense", "block_linear"]

_POSITIONS = 512  # input vectors taken together: their (K, 512) codes stay in the cache


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
        self.masked = [factor.to(dtype) for factor in masked]

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
            here = grad[block.offset : block.offset + block.stop - block.first]
            v_rows = v.index_select(0, block.components)
            to_u[:, block.first : block.stop].index_copy_(0, block.components, v_rows @ here.T)
            to_v.index_add_(0, block.components, _rows(u, block) @ here)
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
