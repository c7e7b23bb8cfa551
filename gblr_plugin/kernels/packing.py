"""Packs structured matrices into the blocks of a layout, as flat buffers that kernels read.

The flat factors hold the column blocks, then the row blocks. The index buffer (int32) holds the lists of all blocks in
that order, the intervals of the components, a table of the blocks and, unless lists are narrow, the groups.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.structure import Intervals, StructuredMatrix
from .layout import GROUP, Block, Layout, is_narrow

__all__ = [
    "active_counts",
    "halved",
    "narrowed",
    "pack",
    "pack_for",
    "tables",
]

_WIDTH_CLASSES = 10  # number of classes of column widths by which components are ordered


def _edges(length: int, block: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of at most ``block`` indices over an axis of ``length``."""
    return [(at, min(at + block, length)) for at in range(0, length, block)]


def _touches(intervals: Intervals, block: int) -> Tensor:
    """Whether each cyclic interval meets each block of its axis, (K, blocks) bool."""
    n = intervals.length
    starts = torch.arange(0, n, block, device=intervals.width.device)
    stops = (starts + block).clamp(max=n)
    begin, width = intervals.start[:, None], intervals.width[:, None]
    end = begin + width
    # An interval is [begin, end) and, where it wraps, also [0, end - n).
    return (width > 0) & (((begin < stops) & (end > starts)) | (starts < end - n))


def _meets(intervals: Intervals, block: int, split_sizes: tuple[int, ...], even: bool) -> Tensor:
    """Which component is active in which block of its row split, (K, splits * blocks) bool.

    With ``even``, inactive components are added to the blocks of full width until all of these have equally many, as
    far as their row splits have enough: torch then multiplies by all blocks in one batched product.
    """
    touches = _touches(intervals, block)
    split = torch.repeat_interleave(torch.tensor(split_sizes, device=touches.device))
    in_split = split[:, None] == torch.arange(len(split_sizes), device=touches.device)
    meets = (in_split[:, :, None] & touches[:, None, :]).flatten(1)
    full = [number for number, (a, b) in enumerate(_edges(intervals.length, block)) if b - a == block]
    if even and full:
        counts = meets.sum(0).view(len(split_sizes), -1)
        missing = counts[:, full].max() - counts
        for number in range(len(split_sizes)):
            for place in full:
                at = number * counts.shape[1] + place
                spare = (in_split[:, number] & ~meets[:, at]).nonzero()[:, 0]
                meets[spare[: int(missing[number, place])], at] = True
    return meets


def active_counts(
    intervals: Intervals, block: int, split_sizes: tuple[int, ...], even: bool = False
) -> list[tuple[int, int]]:
    """(width, active components) of every block that :func:`pack` makes of one axis; arguments as there."""
    counts = _meets(intervals, block, split_sizes, even).sum(0).tolist()
    widths = [b - a for a, b in _edges(intervals.length, block)] * len(split_sizes)
    return list(zip(widths, counts, strict=True))


def _pack_axis(
    factor: Tensor, intervals: Intervals, block: int, meets: Tensor, list_at: int, data_at: int
) -> tuple[tuple[Block, ...], list[Tensor], list[Tensor]]:
    """Blocks of one factor, their lists and entries, from what is active where, (K, splits * blocks)."""
    blocks, lists, data = [], [], []
    edges = _edges(intervals.length, block)
    for number in range(meets.shape[1]):
        split, place = divmod(number, len(edges))
        (start, stop), offset = edges[place], split * intervals.length
        active = meets[:, number].nonzero()[:, 0]
        count = active.numel()
        consecutive = count > 0 and int(active[-1] - active[0]) == count - 1
        first = int(active[0]) if consecutive else -1
        blocks.append(Block(offset + start, offset + stop, count, list_at, data_at, first))
        lists.append(active)
        data.append(factor[active, start:stop].reshape(-1))
        list_at += count
        data_at += count * (stop - start)
    return tuple(blocks), lists, data


def tables(
    blocks: tuple[tuple[Block, ...], tuple[Block, ...]], lists: Tensor, at: int, num: int, narrow: bool = False
) -> list[Tensor]:
    """The words of the index buffer after lists and intervals: block tables, and groups unless lists are narrow.

    Args:
        blocks: Blocks of the columns and of the rows.
        lists: The lists of all of them, one after the other, int64.
        at: First word of the tables.
        num: Number of components.
        narrow: Leave the groups out.

    Returns:
        The table of the columns and the rows; groups of the columns, and of the rows (see :func:`_groups`).
    """
    rows = [(b.start, b.stop - b.start, b.size, b.list_at, b.data_at) for axis in blocks for b in axis]
    found = [torch.tensor(rows, device=lists.device).reshape(-1)]
    if narrow:
        return found
    at, listed = at + found[0].numel(), 0
    for axis in blocks:
        size = sum(block.size for block in axis)
        heads, pairs = _groups(axis, lists[listed : listed + size], num)
        heads[:, 0] += at + heads.numel()
        found.append(torch.cat([heads.reshape(-1), pairs.reshape(-1)]))
        at, listed = at + found[-1].numel(), listed + size
    return found


def _groups(blocks: tuple[Block, ...], lists: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Groups of 64 components and the blocks that any of them meets, for kernels that keep a group's sums.

    Returns:
        (groups, 2) place of a group's first pair, counted from the first of all, and number of its pairs; (pairs, 5)
        start and width of the block, place of the group's first row in it, both halves of the mask of active
        components.
    """
    device, groups = lists.device, -(-num // GROUP)
    facts = torch.tensor([(b.start, b.stop - b.start, b.data_at, b.size) for b in blocks], device=device)
    sizes = facts[:, 3]
    owner = torch.repeat_interleave(torch.arange(len(blocks), device=device), sizes)
    rank = torch.arange(len(lists), device=device) - (sizes.cumsum(0) - sizes)[owner]  # of an entry in its block
    key, order = torch.sort(lists // GROUP * len(blocks) + owner, stable=True)  # by groups, then by blocks
    pair, number, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    start, width, data, _ = facts[pair % len(blocks)].T
    first = data + rank[order][counts.cumsum(0) - counts] * width
    lane = lists[order] % GROUP
    halves = torch.zeros(2, len(pair), dtype=torch.int64, device=device)
    halves.index_put_((lane // 32, number), 1 << (lane % 32), accumulate=True)
    pairs = torch.stack([start, width, first, *halves], 1)
    pairs = torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs)  # masks as two's complement
    per_group = torch.bincount(pair // len(blocks), minlength=groups)
    return torch.stack([5 * (per_group.cumsum(0) - per_group), per_group], 1), pairs


def _clustered(matrix: StructuredMatrix) -> Tensor:
    """An order of the components within their splits that puts similar column intervals side by side, (K,) int64."""
    step = max(matrix.cols.length // _WIDTH_CLASSES, 1)
    split = torch.repeat_interleave(torch.tensor(matrix.split_sizes, device=matrix.u.device))
    key = (split * (matrix.cols.length + 1) + matrix.cols.width // step) * matrix.cols.length + matrix.cols.start
    return torch.sort(key, stable=True).indices


def _joined(pieces: list[Tensor]) -> Tensor:
    """The pieces one after the other; on the CPU in huge pages where the system grants them.

    A product of one token reads all factors once, which takes up to 1.5 times as long from pages of 4 KiB. numpy asks
    for huge pages for arrays of 4 MiB and more, torch does not.
    """
    size, dtype = sum(piece.numel() for piece in pieces), pieces[0].dtype
    if not size or not pieces[0].is_cpu or torch.compiler.is_compiling() or type(pieces[0]) is not Tensor:
        return torch.cat(pieces)
    memory = torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8)).view(dtype)
    return torch.cat(pieces, out=memory)


def pack(
    matrix: StructuredMatrix, block_rows: int, block_cols: int, even: bool = False
) -> tuple[Layout, Tensor, Tensor]:
    """Lay a matrix out in blocks; ``block_rows = 0`` keeps the dense matrix itself.

    Args:
        matrix: Any GBLR matrix; components without cost are dropped.
        block_rows: Block size of the rows (within a split), or 0 for dense storage.
        block_cols: Block size of the columns.
        even: Give the blocks of an axis as many components each, with zeros for factors, so that torch multiplies by
            all of them at once (see :func:`~gblr_plugin.kernels.layout.batches`).

    Returns:
        The layout, the flat factors (floating point) and the index buffer (int32).

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
    order = _clustered(matrix)
    matrix = matrix.select(order)
    num = matrix.num_components
    meets = _meets(matrix.cols, block_cols, (num,), even)
    col_blocks, col_lists, col_data = _pack_axis(matrix.v, matrix.cols, block_cols, meets, 0, 0)
    list_at, data_at = col_blocks[-1].list_at + col_blocks[-1].size, sum(piece.numel() for piece in col_data)
    meets = _meets(matrix.rows, block_rows, matrix.split_sizes, even)
    row_blocks, row_lists, row_data = _pack_axis(matrix.u, matrix.rows, block_rows, meets, list_at, data_at)
    lists = torch.cat([*col_lists, *row_lists])
    facts = [matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start, order]
    table_at = len(lists) + 5 * num
    table, *groups = tables((col_blocks, row_blocks), lists, table_at, num)
    layout = Layout(
        (m, n),
        num,
        matrix.split_sizes,
        matrix.stored,
        row_blocks,
        col_blocks,
        intervals_at=len(lists),
        col_table_at=table_at,
        row_table_at=table_at + 5 * len(col_blocks),
        col_groups_at=table_at + len(table),
        row_groups_at=table_at + len(table) + len(groups[0]),
    )
    return layout, _joined([*col_data, *row_data]), torch.cat([lists, *facts, table, *groups]).to(torch.int32)


def halved(words: Tensor) -> Tensor:
    """Two integers of 16 bits to a word, int32; the last word is filled with zeros."""
    low = words.to(torch.int16)  # keeps the lower bits
    return torch.cat([low, low.new_zeros(len(low) % 2)]).view(torch.int32)


def narrowed(layout: Layout, index: Tensor) -> tuple[Layout, Tensor]:
    """Layout and index buffer with 16-bit lists and intervals and without groups, where 16 bits hold them."""
    if layout.dense or layout.narrow or not is_narrow(layout.num_components, *layout.shape):
        return layout, index
    ends = layout.intervals_at + 5 * layout.num_components
    lists, facts = halved(index[: layout.intervals_at]), halved(index[layout.intervals_at : ends])
    shift = len(lists) + len(facts) - ends
    moved = replace(
        layout,
        intervals_at=len(lists),
        col_table_at=layout.col_table_at + shift,
        row_table_at=layout.row_table_at + shift,
        col_groups_at=0,
        row_groups_at=0,
        narrow=True,
    )
    return moved, torch.cat([lists, facts, index[ends : min(layout.col_groups_at, layout.row_groups_at)]])


def pack_for(
    matrix: StructuredMatrix, block_rows: int, block_cols: int, even: bool = False
) -> tuple[Layout, Tensor, Tensor]:
    """As :func:`pack`, with the lists that the kernels of the matrix's device take: narrow ones on the CPU."""
    layout, values, index = pack(matrix, block_rows, block_cols, even)
    if values.is_cpu:
        layout, index = narrowed(layout, index)
    return layout, values, index
