"""The factored product by torch operations: differentiable, traceable, on any device and dtype.

Stage 1 makes z^T (K, tokens) from the column blocks, ``z^T[list] += V_J x_J^T``; stage 2 makes each row block of the
output from its own list, ``y_J = z^T[list]^T U_J``. z stays transposed so that both take whole rows of it. int8 factors
are cast block by block, and z multiplied by their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Block, Layout, all_lists, block_list, block_values

__all__ = ["CHUNK", "convolution", "linear", "linear_inference"]

CHUNK = 256  # tokens per pass: z^T of a few thousand components then stays in the caches


def _accumulate(z: Tensor, part: Tensor, lists: Tensor, block: Block, dim: int) -> None:
    part = part.to(z.dtype)
    if block.first >= 0:
        z.narrow(dim, block.first, block.size).add_(part)
    else:
        z.index_add_(dim, block_list(lists, block), part)


def _select(z: Tensor, lists: Tensor, block: Block, dim: int) -> Tensor:
    if block.first >= 0:
        return z.narrow(dim, block.first, block.size)
    return z.index_select(dim, block_list(lists, block))


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
    x_t, lists = x.t(), all_lists(layout, index)
    # Without components the empty z is cut from x, to keep the result in its graph.
    num = layout.num_components
    z = x.new_zeros(num, x.shape[0], dtype=_sum_dtype(x.dtype)) if num else x_t[:0]
    for block in layout.col_blocks:
        if block.size:
            part = block_values(values, block).to(x.dtype) @ x_t.narrow(0, block.start, block.stop - block.start)
            _accumulate(z, part, lists, block, 0)
    z = _scaled(z, scales, x.dtype, 0)
    y = torch.cat([_select(z, lists, b, 0).t() @ block_values(values, b).to(x.dtype) for b in layout.row_blocks], dim=1)
    return y if bias is None else y + bias


def linear_inference(
    x: Tensor, values: Tensor, index: Tensor, layout: Layout, bias: Tensor | None, scales: Tensor | None = None
) -> Tensor:
    """As :func:`linear` without gradients: chunks of tokens, results written in place."""
    tokens, m, lists = x.shape[0], layout.shape[0], all_lists(layout, index)
    y = x.new_empty(tokens, m)
    for at in range(0, tokens, CHUNK):
        x_chunk, y_chunk = x[at : at + CHUNK], y[at : at + CHUNK]
        z = x.new_zeros(layout.num_components, x_chunk.shape[0], dtype=_sum_dtype(x.dtype))
        x_t = x_chunk.t()
        for block in layout.col_blocks:
            if not block.size:
                continue
            x_part, factor = x_t[block.start : block.stop], block_values(values, block).to(x.dtype)
            if block.first >= 0 and z.dtype == x.dtype:
                z[block.first : block.first + block.size].addmm_(factor, x_part)
            else:
                _accumulate(z, factor @ x_part, lists, block, 0)
        z = _scaled(z, scales, x.dtype, 0)
        for block in layout.row_blocks:
            z_t, factor = _select(z, lists, block, 0).t(), block_values(values, block).to(x.dtype)
            target = y_chunk[:, block.start : block.stop]
            if bias is None:
                torch.mm(z_t, factor, out=target)
            else:
                torch.addmm(bias[block.start : block.stop], z_t, factor, out=target)
    return y


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
    hold whole channels (see :func:`~gblr_plugin.kernels.plan.fixed_plan`).
    """
    taps, lists = 1, all_lists(layout, index)
    for size in kernel:
        taps *= size
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d

    def stage(x_part: Tensor, weight: Tensor) -> Tensor:
        return convolve(x_part, weight, None, stride, padding, dilation)

    # One component's own shape gives the output size for every padding mode.
    probe = stage(x[:, :1], x.new_zeros(1, 1, *kernel)) if not layout.num_components else None
    z: Tensor | None = None if probe is None else probe[:, :0]
    for block in layout.col_blocks:
        if not block.size:
            continue
        channel, channels = block.start // taps, (block.stop - block.start) // taps
        weight = block_values(values, block).to(x.dtype).view(block.size, channels, *kernel)
        part = stage(x.narrow(1, channel, channels), weight)
        if z is None:
            shape = (part.shape[0], layout.num_components, *part.shape[2:])
            z = part.new_zeros(shape, dtype=_sum_dtype(x.dtype))
        _accumulate(z, part, lists, block, 1)
    assert z is not None  # every component meets a column block
    out_size = z.shape[2:]
    flat = _scaled(z, scales, x.dtype, 1).flatten(2)
    rows = [block_values(values, b).to(x.dtype).t() @ _select(flat, lists, b, 1) for b in layout.row_blocks]
    y: Tensor = torch.cat(rows, dim=1).unflatten(2, out_size)
    return y if bias is None else y + bias.view(-1, *(1 for _ in out_size))
