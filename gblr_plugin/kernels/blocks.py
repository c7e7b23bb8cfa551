"""The factored product by torch operations: differentiable, traceable, on any device and dtype.

Stage 1 makes z^T (K, tokens) from the column blocks, ``z^T[list] += V_J x_J^T``; stage 2 makes each row block of the
output from the block's list, ``y_J = z^T[list]^T U_J``. z stays transposed, so that both stages take full rows of it.
int8 factors are cast block by block, and z is multiplied by their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .buffers import all_lists, batch_values, block_list, block_values
from .layout import Batch, Block, Layout, batches

__all__ = ["CHUNK", "convolution", "linear", "linear_inference"]

CHUNK = 256  # tokens per pass, so that z^T of a few thousand components stays in the caches


def _accumulate(z: Tensor, sums: Tensor, lists: Tensor, block: Block | Batch, dim: int) -> None:
    """Add sums to the rows of z that a list names."""
    if sums.dtype is not z.dtype:
        sums = sums.to(z.dtype)
    if block.first >= 0:
        z.narrow(dim, block.first, block.size).add_(sums)
    else:
        z.index_add_(dim, block_list(lists, block), sums)


def _select(z: Tensor, lists: Tensor, block: Block | Batch, dim: int) -> Tensor:
    if block.first >= 0:
        return z.narrow(dim, block.first, block.size)
    return z.index_select(dim, block_list(lists, block))


def _columns(x: Tensor, batch: Batch) -> Tensor:
    """The columns of x (tokens, n) that a batch covers, (blocks, tokens, width)."""
    columns: Tensor = x.narrow(1, batch.start, batch.blocks * batch.width).unflatten(1, (batch.blocks, batch.width))
    return columns.transpose(0, 1)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over blocks are kept in float32 where the factors are narrower."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _scaled(z: Tensor, scales: Tensor | None, dtype: torch.dtype, dim: int) -> Tensor:
    """Multiply z by the scales of its components, in the dtype of the result."""
    if scales is not None:
        z = z * scales.to(z.dtype).view(*(1,) * dim, -1, *(1,) * (z.dim() - dim - 1))
    return z.to(dtype)


def linear(
    x: Tensor, values: Tensor, index: Tensor, layout: Layout, bias: Tensor | None, scales: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n); returns (tokens, m). Differentiable in x and bias; static shapes."""
    lists = all_lists(layout, index)
    # Without components the empty z is cut from x, to keep the result in its graph.
    num = layout.num_components
    z = x.new_zeros(num, x.shape[0], dtype=_sum_dtype(x.dtype)) if num else x.t()[:0]
    for batch in batches(layout.col_blocks):
        if batch.size:
            sums = batch_values(values, batch).to(x.dtype) @ _columns(x, batch).transpose(1, 2)
            _accumulate(z, sums.flatten(0, 1), lists, batch, 0)
    z = _scaled(z, scales, x.dtype, 0)
    rows = []
    for batch in batches(layout.row_blocks):
        inputs = _select(z, lists, batch, 0).unflatten(0, (batch.blocks, batch.size)).transpose(1, 2)
        rows.append((inputs @ batch_values(values, batch).to(x.dtype)).transpose(0, 1).flatten(1))
    y = torch.cat(rows, dim=1)
    return y if bias is None else y + bias


def linear_inference(
    x: Tensor, values: Tensor, index: Tensor, layout: Layout, bias: Tensor | None, scales: Tensor | None = None
) -> Tensor:
    """As :func:`linear` without gradients: chunks of tokens, results written in place, few calls of torch."""
    tokens, m, dtype = x.shape[0], layout.shape[0], x.dtype
    y, sums = x.new_empty(tokens, m), _sum_dtype(dtype)
    lists = all_lists(layout, index).narrow(0, 0, layout.list_entries).long()
    for at in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - at)
        z = x.new_zeros(layout.num_components, count, dtype=sums)
        for batch in layout.col_batches:
            if batch.size:
                _add_columns(z, _tokens(x, at, count, batch), _factors(values, batch, dtype), lists, batch)
        if scales is not None or sums is not dtype:
            z = _scaled(z, scales, dtype, 0)
        for batch in layout.row_batches:
            inputs = _select(z, lists, batch, 0).view(batch.blocks, batch.size, count).transpose(1, 2)
            target, factors = _tokens(y, at, count, batch), _factors(values, batch, dtype)
            if bias is None:
                torch.bmm(inputs, factors, out=target)
            else:
                start = bias.narrow(0, batch.start, batch.blocks * batch.width).view(batch.blocks, 1, batch.width)
                torch.baddbmm(start, inputs, factors, out=target)
    return y


def _tokens(x: Tensor, at: int, count: int, batch: Batch) -> Tensor:
    """As :func:`_columns` for some tokens, in one call of torch."""
    row, column = x.stride()
    place = x.storage_offset() + at * row + batch.start * column
    return x.as_strided((batch.blocks, count, batch.width), (batch.width * column, row, column), place)


def _factors(values: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """As :func:`batch_values` in a dtype, in one call of torch where the factors have it."""
    size, width = batch.size, batch.width
    place = values.storage_offset() + batch.data_at
    factors = values.as_strided((batch.blocks, size, width), (size * width, width, 1), place)
    return factors if values.dtype is dtype else factors.to(dtype)


def _add_columns(z: Tensor, x: Tensor, factor: Tensor, lists: Tensor, batch: Batch) -> None:
    """``z[list] += V x^T`` for a batch of column blocks and x (blocks, tokens, width)."""
    if batch.first >= 0 and z.dtype == x.dtype:
        z.narrow(0, batch.first, batch.size).addmm_(factor[0], x[0].t())
    elif x.shape[1] == 1:  # torch adds to vectors faster than to matrices of one column
        _accumulate(z.view(-1), torch.bmm(x, factor.mT).view(-1), lists, batch, 0)
    else:
        _accumulate(z, torch.bmm(factor, x.mT).view(-1, x.shape[1]), lists, batch, 0)


def convolution(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    layout: Layout,
    bias: Tensor | None,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    scales: Tensor | None = None,
) -> Tensor:
    """Convolution of x (batch, c_in, ...) with the (c_out, c_in * prod(kernel)) matrix; returns (batch, c_out, ...).

    Stage 1 convolves the channels of each column block with its components; stage 2 is a 1x1 convolution. Column blocks
    hold complete channels (see :func:`~gblr_plugin.kernels.plan.fixed_plan`).
    """
    taps, lists = 1, all_lists(layout, index)
    for size in kernel:
        taps *= size
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d

    def stage(channels: Tensor, weight: Tensor) -> Tensor:
        return convolve(channels, weight, None, stride, padding, dilation)

    # A component of zeros gives the size of the output for every kind of padding.
    probe = stage(x[:, :1], x.new_zeros(1, 1, *kernel)) if not layout.num_components else None
    z: Tensor | None = None if probe is None else probe[:, :0]
    for block in layout.col_blocks:
        if not block.size:
            continue
        channel, channels = block.start // taps, (block.stop - block.start) // taps
        weight = block_values(values, block).to(x.dtype).view(block.size, channels, *kernel)
        sums = stage(x.narrow(1, channel, channels), weight)
        if z is None:
            shape = (sums.shape[0], layout.num_components, *sums.shape[2:])
            z = sums.new_zeros(shape, dtype=_sum_dtype(x.dtype))
        _accumulate(z, sums, lists, block, 1)
    assert z is not None  # every component meets a column block
    out_size = z.shape[2:]
    flat = _scaled(z, scales, x.dtype, 1).flatten(2)
    rows = [block_values(values, b).to(x.dtype).t() @ _select(flat, lists, b, 1) for b in layout.row_blocks]
    y: Tensor = torch.cat(rows, dim=1).unflatten(2, out_size)
    return y if bias is None else y + bias.view(-1, *(1 for _ in out_size))
