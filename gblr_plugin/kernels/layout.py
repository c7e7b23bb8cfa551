"""Block storage of a GBLR matrix: fixed blocks of rows and columns, each with the exact list of its active components.

Column block J keeps V[list, J], row block I keeps U[list, I], both dense and row-major, where ``list`` names the
components whose interval meets the block. A product then is a few dense products per block and no more: wrap-around
intervals cost nothing extra, and the only waste is the zeros where an interval ends inside a block (none if ends are
block multiples).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..structure import Intervals, StructuredMatrix

__all__ = [
    "Block",
    "Layout",
    "block_values",
    "count_blocks",
    "edges",
    "pack",
    "padded_entries",
    "to_dense",
    "touched_blocks",
    "unpack",
]


class Block(NamedTuple):
    """One block of an axis: indices ``start:stop``, its component list and the place of its factor entries."""

    start: int
    stop: int
    size: int  # active components
    list_at: int  # first entry of the list in `Packed.index`
    data_at: int  # first entry of the (count, stop - start) factors in the flat values
    first: int  # first component where the list is one run of consecutive numbers, else -1


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the flat buffers; hashable, free of tensors, so that traced programs see constants.

    Args:
        shape: (m, n) of the matrix.
        num_components: K, stored components (those without cost are dropped).
        split_sizes: Components of each row split.
        stored: Factor entries inside the intervals, without padding.
        row_blocks: Blocks of U; empty if ``dense``.
        col_blocks: Blocks of V; empty if ``dense``.
        intervals_at: First entry in the index buffer of the (4, K) row widths and starts, column widths and starts.
        col_table_at: First entry in the index buffer of (start, width, count, list_at, data_at) per column block.
        row_table_at: The same for row blocks.
        dense: The values are the (m, n) matrix itself, row-major (or (n, m) if ``transposed``).
        transposed: The matrix is the transpose of the one that was packed.
    """

    shape: tuple[int, int]
    num_components: int
    split_sizes: tuple[int, ...]
    stored: int
    row_blocks: tuple[Block, ...]
    col_blocks: tuple[Block, ...]
    intervals_at: int
    col_table_at: int = 0
    row_table_at: int = 0
    dense: bool = False
    transposed: bool = False

    @property
    def entries(self) -> int:
        """Multiply-adds of one product as executed, padding included."""
        if self.dense:
            return self.shape[0] * self.shape[1]
        return sum(b.size * (b.stop - b.start) for b in (*self.row_blocks, *self.col_blocks))

    @property
    def padding(self) -> float:
        """Stored entries over those inside the intervals; 1.0 when every interval ends on block borders."""
        return self.entries / self.stored if self.stored else 1.0

    def t(self) -> Layout:
        """Layout of the transposed matrix over the same buffers."""
        return replace(
            self,
            shape=(self.shape[1], self.shape[0]),
            row_blocks=self.col_blocks,
            col_blocks=self.row_blocks,
            row_table_at=self.col_table_at,
            col_table_at=self.row_table_at,
            transposed=not self.transposed,
        )


def edges(length: int, block: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of at most ``block`` indices over an axis of ``length``."""
    return [(at, min(at + block, length)) for at in range(0, length, block)]


def _touches(intervals: Intervals, block: int) -> Tensor:
    """(K, blocks) bool: does the cyclic interval meet the block of its axis."""
    n = intervals.length
    starts = torch.arange(0, n, block, device=intervals.width.device)
    stops = (starts + block).clamp(max=n)
    begin, width = intervals.start[:, None], intervals.width[:, None]
    end = begin + width
    # An interval is [begin, end) and, where it wraps, also [0, end - n).
    return (width > 0) & (((begin < stops) & (end > starts)) | (starts < end - n))


def count_blocks(length: int, block: int) -> int:
    """Number of blocks of one axis."""
    return -(-length // block)


def touched_blocks(intervals: Intervals, block: int) -> int:
    """Sum over the blocks of the number of components that meet them."""
    return int(_touches(intervals, block).sum())


def padded_entries(intervals: Intervals, block: int) -> int:
    """Entries that blocks of this size store for one factor, padding included."""
    n = intervals.length
    sizes = torch.tensor([b - a for a, b in edges(n, block)], device=intervals.width.device)
    return int((_touches(intervals, block).sum(0) * sizes).sum())


def _pack_axis(
    factor: Tensor, intervals: Intervals, block: int, split_sizes: tuple[int, ...], list_at: int, data_at: int
) -> tuple[list[Block], list[Tensor], list[Tensor]]:
    blocks, lists, data = [], [], []
    touches = _touches(intervals, block)
    part_edges = edges(intervals.length, block)
    first_component = 0
    for split, size in enumerate(split_sizes):
        offset = split * intervals.length
        for number, (start, stop) in enumerate(part_edges):
            active = touches[first_component : first_component + size, number].nonzero()[:, 0] + first_component
            count = active.numel()
            run = count > 0 and int(active[-1] - active[0]) == count - 1
            first = int(active[0]) if run else -1
            blocks.append(Block(offset + start, offset + stop, count, list_at, data_at, first))
            lists.append(active)
            data.append(factor[active, start:stop].reshape(-1))
            list_at += count
            data_at += count * (stop - start)
        first_component += size
    return blocks, lists, data


def pack(matrix: StructuredMatrix, block_rows: int, block_cols: int) -> tuple[Layout, Tensor, Tensor]:
    """Store a matrix in blocks; ``block_rows = 0`` stores the dense matrix itself.

    Args:
        matrix: Any GBLR matrix; components without cost are dropped.
        block_rows: Block size of the rows (within a split), or 0 for dense storage.
        block_cols: Block size of the columns.

    Returns:
        The layout, the flat values (floating point) and the index buffer (int32: lists, then intervals).

    Raises:
        ConfigError: If a block size is negative or only one of them is 0.
    """
    if min(block_rows, block_cols) < 0 or (block_rows == 0) != (block_cols == 0):
        raise ConfigError(f"layout: block sizes must be positive, or both 0 for dense, got {block_rows}, {block_cols}")
    matrix = matrix.live()
    m, n = matrix.shape
    if block_rows == 0:
        layout = Layout((m, n), m, (m,), m * n, (), (), 0, dense=True)
        index = torch.zeros(0, dtype=torch.int32, device=matrix.u.device)
        return layout, matrix.to_dense().reshape(-1).contiguous(), index
    num = matrix.num_components
    col_blocks, col_lists, col_data = _pack_axis(matrix.v, matrix.cols, block_cols, (num,), 0, 0)
    list_at = col_blocks[-1].list_at + col_blocks[-1].size
    data_at = sum(part.numel() for part in col_data)
    row_blocks, row_lists, row_data = _pack_axis(
        matrix.u, matrix.rows, block_rows, matrix.split_sizes, list_at, data_at
    )
    ends = [matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start]
    table = torch.tensor(
        [(b.start, b.stop - b.start, b.size, b.list_at, b.data_at) for b in (*col_blocks, *row_blocks)]
    )
    index = torch.cat([*col_lists, *row_lists, *ends, table.reshape(-1).to(matrix.u.device)]).to(torch.int32)
    table_at = index.numel() - table.numel()
    values = torch.cat([*col_data, *row_data])
    layout = Layout(
        (m, n),
        num,
        matrix.split_sizes,
        matrix.stored,
        tuple(row_blocks),
        tuple(col_blocks),
        table_at - 4 * num,
        table_at,
        table_at + 5 * len(col_blocks),
    )
    return layout, values, index


def block_values(values: Tensor, block: Block) -> Tensor:
    """(count, stop - start) view of a block's factors."""
    width = block.stop - block.start
    return values.narrow(0, block.data_at, block.size * width).view(block.size, width)


def _unpack_axis(blocks: tuple[Block, ...], num: int, length: int, values: Tensor, index: Tensor) -> Tensor:
    """(K, length) factor; a stacked axis folds onto its splits, each component living in one of them."""
    factor = values.new_zeros(num, length)
    for block in blocks:
        at = block.start % length
        rows = index.narrow(0, block.list_at, block.size).long()
        factor[rows, at : at + block.stop - block.start] = block_values(values, block)
    return factor


def unpack(layout: Layout, values: Tensor, index: Tensor) -> StructuredMatrix:
    """The structured matrix that was packed; a dense one comes back as its rows (m components of 1 x n).

    Raises:
        ConfigError: For the transpose of a matrix packed with row splits, whose columns are no single cyclic axis.
    """
    m, n = layout.shape
    if layout.dense:
        dense = to_dense(layout, values, index)
        one_row = Intervals(
            torch.ones(m, dtype=torch.int64, device=values.device), torch.arange(m, device=values.device), m
        )
        eye = torch.eye(m, dtype=values.dtype, device=values.device)
        return StructuredMatrix(eye, dense, one_row, Intervals.full(m, n, values.device), (m,))
    splits = len(layout.split_sizes)
    if layout.transposed and splits > 1:
        raise ConfigError(
            "GBLR tensor: the transpose of a matrix with row splits has no structured form, use to_dense()"
        )
    num, part = layout.num_components, m // splits
    ends = index.narrow(0, layout.intervals_at, 4 * num).long().view(4, num)
    if layout.transposed:
        ends = ends[[2, 3, 0, 1]]
    return StructuredMatrix(
        _unpack_axis(layout.row_blocks, num, part, values, index),
        _unpack_axis(layout.col_blocks, num, n, values, index),
        Intervals(ends[0], ends[1], part),
        Intervals(ends[2], ends[3], n),
        layout.split_sizes,
    )


def to_dense(layout: Layout, values: Tensor, index: Tensor) -> Tensor:
    """The (m, n) matrix; traceable (static shapes only)."""
    m, n = layout.shape
    if layout.dense:
        return values.view(n, m).t() if layout.transposed else values.view(m, n)
    factor = _unpack_axis(layout.col_blocks, layout.num_components, n, values, index)
    parts = [
        block_values(values, block).t() @ factor.index_select(0, index.narrow(0, block.list_at, block.size))
        for block in layout.row_blocks
    ]
    return torch.cat(parts)
