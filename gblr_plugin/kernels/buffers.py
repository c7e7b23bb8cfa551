"""Read the buffers that :mod:`~gblr_plugin.kernels.packing` made: views of blocks, the matrix again, int8 factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.structure import Intervals, StructuredMatrix
from .layout import Batch, Block, Layout

__all__ = [
    "all_lists",
    "batch_values",
    "block_list",
    "block_values",
    "interval_facts",
    "quantize",
    "rows_as_components",
    "to_dense",
    "unpack",
]

_INT8 = 127.0  # largest magnitude of an int8 factor


def block_values(values: Tensor, block: Block) -> Tensor:
    """(size, stop - start) view of a block's factors."""
    width = block.stop - block.start
    return values.narrow(0, block.data_at, block.size * width).view(block.size, width)


def batch_values(values: Tensor, batch: Batch) -> Tensor:
    """(blocks, size, width) view of the factors of a batch."""
    entries = values.narrow(0, batch.data_at, batch.blocks * batch.size * batch.width)
    return entries.view(batch.blocks, batch.size, batch.width)


def all_lists(layout: Layout, index: Tensor) -> Tensor:
    """The index buffer as :func:`block_list` reads it."""
    return index.view(torch.int16) if layout.narrow else index


def block_list(lists: Tensor, block: Block | Batch) -> Tensor:
    """Components of a block, or of a batch's blocks one after the other, (count,) int64, from :func:`all_lists`.

    torch adds at places named by int64 ten times as fast as at those named by int32.
    """
    count = block.blocks * block.size if isinstance(block, Batch) else block.size
    return lists.narrow(0, block.list_at, count).long()


def interval_facts(layout: Layout, index: Tensor) -> Tensor:
    """Row widths, row starts, column widths, column starts and original numbers of the components, (5, K) int64."""
    num = layout.num_components
    if not layout.narrow:
        return index.narrow(0, layout.intervals_at, 5 * num).long().view(5, num)
    # Widths may exceed the range of int16; they are its 16 bits without a sign.
    return (index.view(torch.int16).narrow(0, 2 * layout.intervals_at, 5 * num).long() & 0xFFFF).view(5, num)


def quantize(layout: Layout, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Round factors to int8, symmetrically: each of u_k and v_k is scaled by its largest entry.

    The matrix depends only on the product of a component's two scales, so that one number is kept. Kernels take
    int8 factors with the lists of :func:`narrowed`.

    Args:
        layout: Layout of the buffers; dense storage has a scale per stored row.
        values: Flat floating-point factors.
        index: int32 index buffer.

    Returns:
        (entries,) int8, and (components,) or (stored rows,) in the dtype of ``values``.
    """
    if layout.dense:
        rows = values.float().view(layout.shape[1 if layout.transposed else 0], -1)
        scale = rows.abs().amax(1) / _INT8
        rounded = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8)
        return rounded.view(-1), scale.to(values.dtype)
    lists, result = all_lists(layout, index), torch.zeros_like(values, dtype=torch.int8)
    scales = values.new_ones(layout.num_components, dtype=torch.float32)
    for blocks in (layout.col_blocks, layout.row_blocks):
        largest = torch.zeros_like(scales)
        for block in blocks:
            if block.size:
                members = block_list(lists, block)
                largest[members] = largest[members].maximum(block_values(values, block).float().abs().amax(1))
        scale = largest / _INT8
        for block in blocks:
            divisor = scale.index_select(0, block_list(lists, block))[:, None]
            entries = block_values(values, block).float() / torch.where(divisor > 0, divisor, 1.0)
            block_values(result, block).copy_(entries.round())
        scales *= scale
    return result, scales.to(values.dtype)


def _unpack_axis(blocks: tuple[Block, ...], num: int, length: int, values: Tensor, lists: Tensor) -> Tensor:
    """(K, length) factor; blocks of all row splits lie on one axis of a split's length."""
    factor = values.new_zeros(num, length)
    for block in blocks:
        at = block.start % length
        factor[block_list(lists, block), at : at + block.stop - block.start] = block_values(values, block)
    return factor


def rows_as_components(matrix: Tensor) -> StructuredMatrix:
    """A dense (m, n) matrix as m components of one row each."""
    (m, n), device = matrix.shape, matrix.device
    each = Intervals.of_known(torch.ones(m, dtype=torch.int64, device=device), torch.arange(m, device=device), m)
    eye = torch.eye(m, dtype=matrix.dtype, device=device)
    return StructuredMatrix(eye, matrix, each, Intervals.full(m, n, device), (m,))


def unpack(layout: Layout, values: Tensor, index: Tensor, scales: Tensor | None = None) -> StructuredMatrix:
    """The structured matrix that was packed; a dense matrix is returned as its rows (m components of 1 x n).

    int8 factors are returned in floating point, each of u_k and v_k times the root of the scale.

    Raises:
        ConfigError: For the transpose of a matrix packed with row splits, whose columns are no single cyclic axis.
    """
    m, n = layout.shape
    splits = len(layout.split_sizes)
    if layout.dense:
        return rows_as_components(to_dense(layout, values, index, scales))
    if layout.transposed and splits > 1:
        raise ConfigError(
            "GBLR tensor: the transpose of a matrix with row splits has no structured form, use to_dense()"
        )
    num, height = layout.num_components, m // splits
    facts = interval_facts(layout, index)
    order = torch.argsort(facts[4])
    if layout.transposed:
        facts = facts[[2, 3, 0, 1]]
    row_width, row_start, col_width, col_start = facts[:4, order]
    lists = all_lists(layout, index)
    u = _unpack_axis(layout.row_blocks, num, height, values, lists)
    v = _unpack_axis(layout.col_blocks, num, n, values, lists)
    if scales is not None:
        root = scales.sqrt()[:, None]
        u, v = u.to(scales.dtype) * root, v.to(scales.dtype) * root
    rows, cols = Intervals(row_width, row_start, height), Intervals(col_width, col_start, n)
    return StructuredMatrix(u[order], v[order], rows, cols, layout.split_sizes)


def to_dense(layout: Layout, values: Tensor, index: Tensor, scales: Tensor | None = None) -> Tensor:
    """The (m, n) matrix in floating point; traceable, since all its shapes are static."""
    m, n = layout.shape
    if layout.dense:
        matrix = values.view(n, m) if layout.transposed else values.view(m, n)
        if scales is not None:
            matrix = matrix.to(scales.dtype) * scales[:, None]
        return matrix.t() if layout.transposed else matrix
    lists = all_lists(layout, index)
    factor = _unpack_axis(layout.col_blocks, layout.num_components, n, values, lists)
    if scales is not None:
        factor = factor.to(scales.dtype) * scales[:, None]
    rows = [
        block_values(values, block).to(factor.dtype).t() @ factor.index_select(0, block_list(lists, block))
        for block in layout.row_blocks
    ]
    return torch.cat(rows)
