"""Block storage of a GBLR matrix: fixed blocks of rows and columns, each with the exact list of its active components.

Column block J keeps V[list, J], row block I keeps U[list, I], both dense and row-major, where ``list`` names the
components whose interval meets the block. A product then is a few dense products per block and no more: wrap-around
intervals cost nothing extra, and the only waste is the zeros where an interval ends inside a block (none if ends are
block multiples).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.structure import Intervals, StructuredMatrix

__all__ = [
    "Batch",
    "Block",
    "Layout",
    "active_counts",
    "all_lists",
    "batch_values",
    "batches",
    "block_list",
    "block_values",
    "chained",
    "edges",
    "halved",
    "interval_facts",
    "is_narrow",
    "narrowed",
    "pack",
    "pack_for",
    "quantize",
    "set_fields",
    "tables",
    "to_dense",
    "unpack",
]

GROUP = 64  # components per group
_INT8 = 127.0  # largest magnitude of an int8 factor
WIDTH_CLASSES = 10  # of the column widths, when ordering components


class Block(NamedTuple):
    """One block of an axis: indices ``start:stop``, its component list and the place of its factor entries."""

    start: int
    stop: int
    size: int  # active components
    list_at: int  # first entry of the list in `Packed.index`
    data_at: int  # first entry of the (count, stop - start) factors in the flat values
    first: int  # first component where the list is one run of consecutive numbers, else -1


class Batch(NamedTuple):
    """Blocks of one shape, one after the other in the axis, the lists and the factors."""

    start: int
    blocks: int
    width: int  # of each block
    size: int  # active components of each
    list_at: int
    data_at: int
    first: int  # as of a block; -1 for more than one


def batches(blocks: tuple[Block, ...]) -> list[Batch]:
    """The blocks of an axis in as few batches as there can be; each is one product of torch."""
    found: list[Batch] = []
    for block in blocks:
        width, last = block.stop - block.start, found[-1] if found else None
        if last is not None and (last.width, last.size) == (width, block.size):
            found[-1] = last._replace(blocks=last.blocks + 1, first=-1)
        else:
            found.append(Batch(block.start, 1, width, block.size, block.list_at, block.data_at, block.first))
    return found


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
        intervals_at: First word of the index buffer of the (5, K) row widths and starts, column widths and starts, and
            original numbers of the components; :func:`interval_facts` reads them.
        col_table_at: First entry in the index buffer of (start, width, count, list_at, data_at) per column block.
        row_table_at: The same for row blocks.
        col_groups_at: First entry of the groups of components and the column blocks that they meet, see ``_groups``.
        row_groups_at: The same for row blocks.
        dense: The values are the (m, n) matrix itself, row-major (or (n, m) if ``transposed``).
        transposed: The matrix is the transpose of the one that was packed.
        narrow: Lists and intervals are 16 bits wide, two to a word of the index buffer, and there are no groups: beside
            small or int8 factors lists would else weigh too much. Kernels for CUDA do not take them.

    Raises:
        ConfigError: If the numbers do not follow from one another as :func:`pack` and :func:`narrowed` lay things out.
            A file may claim any numbers; a layout that exists is sound.
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
    col_groups_at: int = 0
    row_groups_at: int = 0
    dense: bool = False
    transposed: bool = False
    narrow: bool = False

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

    @cached_property
    def row_batches(self) -> list[Batch]:
        """:func:`batches` of the rows."""
        return batches(self.row_blocks)

    @cached_property
    def col_batches(self) -> list[Batch]:
        """:func:`batches` of the columns."""
        return batches(self.col_blocks)

    @cached_property
    def list_entries(self) -> int:
        """Length of all lists together; they come first in the index buffer."""
        return sum(block.size for block in (*self.row_blocks, *self.col_blocks))

    def __post_init__(self) -> None:
        try:
            sound = _is_sound(self)
        except (TypeError, ValueError, AttributeError, IndexError):  # numbers that are none, tuples of another length
            sound = False
        if not sound:
            raise ConfigError("layout: its blocks and places do not follow from one another")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_fields(self, state)

    def t(self) -> Layout:
        """Layout of the transposed matrix over the same buffers."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Layout:
        result = replace(
            self,
            shape=(self.shape[1], self.shape[0]),
            row_blocks=self.col_blocks,
            col_blocks=self.row_blocks,
            row_table_at=self.col_table_at,
            col_table_at=self.row_table_at,
            row_groups_at=self.col_groups_at,
            col_groups_at=self.row_groups_at,
            transposed=not self.transposed,
        )
        vars(result)["_transposed"] = self
        return result


def set_fields(target: Any, state: Any) -> None:
    """Fill a new object of a frozen dataclass from what a file claims, as its constructor would.

    Raises:
        ConfigError: If it has values already, a field is unknown or missing, or as the constructor.
    """
    if not isinstance(state, dict) or vars(target):
        raise ConfigError(f"{type(target).__name__.lower()}: its state is damaged")
    try:
        type(target).__init__(target, **state)
    except TypeError as error:
        raise ConfigError(f"{type(target).__name__.lower()}: its state is damaged: {error}") from error


def _is_sound(layout: Layout) -> bool:
    """Do the numbers of a layout, which may be anything, follow from one another."""
    flags = layout.dense, layout.transposed, layout.narrow
    places = (
        layout.intervals_at,
        layout.col_table_at,
        layout.row_table_at,
        layout.col_groups_at,
        layout.row_groups_at,
    )
    counts = (layout.num_components, layout.stored, *layout.split_sizes, *places)
    if any(type(flag) is not bool for flag in flags) or not all(map(_is_count, (*layout.shape, *counts))):
        return False
    kinds = (layout.shape, layout.split_sizes, layout.row_blocks, layout.col_blocks)
    if any(type(part) is not tuple for part in kinds):
        return False
    rows, cols = layout.row_blocks, layout.col_blocks
    (m, n), (row_table, col_table) = layout.shape, (layout.row_table_at, layout.col_table_at)
    row_groups, col_groups = layout.row_groups_at, layout.col_groups_at
    if layout.transposed:
        (m, n), (rows, cols) = (n, m), (cols, rows)
        (row_table, col_table), (row_groups, col_groups) = (col_table, row_table), (col_groups, row_groups)
    num, splits = layout.num_components, len(layout.split_sizes)
    if min(m, n) < 1 or layout.stored > m * n:
        return False
    if layout.dense:
        facts = (num, layout.split_sizes, layout.stored, rows, cols, layout.narrow, *places)
        return facts == (m, (m,), m * n, (), (), False, 0, 0, 0, 0, 0)
    if not splits or sum(layout.split_sizes) != num or m % splits or (layout.narrow and not is_narrow(num, m, n)):
        return False
    col_end = chained(cols, n, (num,), (0, 0))
    row_end = None if col_end is None else chained(rows, m // splits, layout.split_sizes, col_end)
    if row_end is None or max(row_end) >= 1 << 31:
        return False
    listed = row_end[0]
    lists, facts_words = (-(-listed // 2), -(-5 * num // 2)) if layout.narrow else (listed, 5 * num)
    first_table = lists + facts_words
    tables_end = first_table + 5 * (len(cols) + len(rows))
    if (layout.intervals_at, col_table, row_table) != (lists, first_table, first_table + 5 * len(cols)):
        return False
    if layout.narrow:
        return col_groups == row_groups == 0
    pairs, over = divmod(row_groups - col_groups - 2 * -(-num // GROUP), 5)
    return col_groups == tables_end and not over and 0 <= pairs <= listed


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def chained(
    blocks: tuple[Block, ...], length: int, split_sizes: tuple[int, ...], at: tuple[int, int]
) -> tuple[int, int] | None:
    """Do blocks follow one another over each split of an axis, and their lists and factors in the buffers.

    Args:
        blocks: Of one axis.
        length: Of each split.
        split_sizes: Components of each.
        at: Where the first list and the first factors begin.

    Returns:
        Where the last ones end; None if a block is not where it must be, or claims components that there are not.
    """
    per_split = len(blocks) // len(split_sizes)
    if not blocks or per_split * len(split_sizes) != len(blocks) or not all(map(_is_count, blocks[0][:5])):
        return None
    block, first = blocks[0].stop - blocks[0].start, 0
    if block < 1 or per_split != -(-length // block):
        return None
    list_at, data_at = at
    for split, components in enumerate(split_sizes):
        for number in range(per_split):
            own = blocks[split * per_split + number]
            start, stop = number * block, min((number + 1) * block, length)
            if type(own) is not Block or any(type(value) is not int for value in own):
                return None
            if not 0 <= own.size <= components:
                return None
            if own[:5] != (split * length + start, split * length + stop, own.size, list_at, data_at):
                return None
            if own.first != -1 and not (own.size and first <= own.first <= first + components - own.size):
                return None
            list_at, data_at = list_at + own.size, data_at + own.size * (stop - start)
        first += components
    return list_at, data_at


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


def _meets(intervals: Intervals, block: int, split_sizes: tuple[int, ...], even: bool) -> Tensor:
    """Which component is active in which block of its own split, (K, splits * blocks) bool.

    ``even`` adds components to blocks of the full width until all of those have as many, where their splits have them:
    torch then takes all blocks in one product.
    """
    touches = _touches(intervals, block)
    split = torch.repeat_interleave(torch.tensor(split_sizes, device=touches.device))
    own = split[:, None] == torch.arange(len(split_sizes), device=touches.device)
    meets = (own[:, :, None] & touches[:, None, :]).flatten(1)
    whole = [number for number, (a, b) in enumerate(edges(intervals.length, block)) if b - a == block]
    if even and whole:
        counts = meets.sum(0).view(len(split_sizes), -1)
        missing = counts[:, whole].max() - counts
        for part in range(len(split_sizes)):
            for number in whole:
                at = part * counts.shape[1] + number
                spare = (own[:, part] & ~meets[:, at]).nonzero()[:, 0]
                meets[spare[: int(missing[part, number])], at] = True
    return meets


def active_counts(
    intervals: Intervals, block: int, split_sizes: tuple[int, ...], even: bool = False
) -> list[tuple[int, int]]:
    """(width, active components) of every block that :func:`pack` makes of one axis; arguments as there."""
    counts = _meets(intervals, block, split_sizes, even).sum(0).tolist()
    widths = [b - a for a, b in edges(intervals.length, block)] * len(split_sizes)
    return list(zip(widths, counts, strict=True))


def _pack_axis(
    factor: Tensor, intervals: Intervals, block: int, touches: Tensor, list_at: int, data_at: int
) -> tuple[list[Block], list[Tensor], list[Tensor]]:
    """Blocks of one factor, their lists and entries, from what is active where, (K, splits * blocks)."""
    blocks, lists, data = [], [], []
    part_edges = edges(intervals.length, block)
    for number in range(touches.shape[1]):
        offset = number // len(part_edges) * intervals.length
        start, stop = part_edges[number % len(part_edges)]
        active = touches[:, number].nonzero()[:, 0]
        count = active.numel()
        run = count > 0 and int(active[-1] - active[0]) == count - 1
        first = int(active[0]) if run else -1
        blocks.append(Block(offset + start, offset + stop, count, list_at, data_at, first))
        lists.append(active)
        data.append(factor[active, start:stop].reshape(-1))
        list_at += count
        data_at += count * (stop - start)
    return blocks, lists, data


def tables(
    blocks: tuple[tuple[Block, ...], tuple[Block, ...]], lists: Tensor, at: int, num: int, narrow: bool = False
) -> list[Tensor]:
    """What follows lists and intervals in the index buffer: block tables, and groups unless lists are narrow.

    Args:
        blocks: Of the columns and of the rows.
        lists: Of all of them, one after the other, int64.
        at: First word of the tables.
        num: Number of components.
        narrow: Without groups.

    Returns:
        The table of the columns and the rows; groups of the columns, and of the rows (see :func:`_groups`).
    """
    rows = [(b.start, b.stop - b.start, b.size, b.list_at, b.data_at) for axis in blocks for b in axis]
    parts = [torch.tensor(rows, device=lists.device).reshape(-1)]
    if narrow:
        return parts
    at, listed = at + parts[0].numel(), 0
    for axis in blocks:
        own = sum(block.size for block in axis)
        heads, pairs = _groups(axis, lists[listed : listed + own], num)
        heads[:, 0] += at + heads.numel()
        parts.append(torch.cat([heads.reshape(-1), pairs.reshape(-1)]))
        at, listed = at + parts[-1].numel(), listed + own
    return parts


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
    """An order of the components within their splits that puts like column intervals side by side, (K,) int64."""
    step = max(matrix.cols.length // WIDTH_CLASSES, 1)
    split = torch.repeat_interleave(torch.tensor(matrix.split_sizes, device=matrix.u.device))
    key = (split * (matrix.cols.length + 1) + matrix.cols.width // step) * matrix.cols.length + matrix.cols.start
    return torch.sort(key, stable=True).indices


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; on the CPU in huge pages where the system grants them.

    One token reads all factors once: on pages of 4 KiB that took up to 1.5 times as long. numpy asks for huge pages for
    arrays of 4 MiB and more, torch does not.
    """
    size, dtype = sum(part.numel() for part in parts), parts[0].dtype
    if not size or not parts[0].is_cpu or torch.compiler.is_compiling() or type(parts[0]) is not Tensor:
        return torch.cat(parts)
    room = torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8)).view(dtype)
    return torch.cat(parts, out=room)


def pack(
    matrix: StructuredMatrix, block_rows: int, block_cols: int, even: bool = False
) -> tuple[Layout, Tensor, Tensor]:
    """Store a matrix in blocks; ``block_rows = 0`` stores the dense matrix itself.

    Args:
        matrix: Any GBLR matrix; components without cost are dropped.
        block_rows: Block size of the rows (within a split), or 0 for dense storage.
        block_cols: Block size of the columns.
        even: Give the blocks of an axis as many components each, with zeros for factors, so that torch multiplies by
            all of them at once (see :func:`batches`).

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
    order = _clustered(matrix)
    matrix = matrix.select(order)
    num = matrix.num_components
    col_touches = _meets(matrix.cols, block_cols, (num,), even)
    row_touches = _meets(matrix.rows, block_rows, matrix.split_sizes, even)
    col_blocks, col_lists, col_data = _pack_axis(matrix.v, matrix.cols, block_cols, col_touches, 0, 0)
    list_at = col_blocks[-1].list_at + col_blocks[-1].size
    data_at = sum(part.numel() for part in col_data)
    row_blocks, row_lists, row_data = _pack_axis(matrix.u, matrix.rows, block_rows, row_touches, list_at, data_at)
    facts = [matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start, order]
    lists = torch.cat([*col_lists, *row_lists])
    facts_at = len(lists)
    col_table_at = facts_at + 5 * num
    row_table_at = col_table_at + 5 * len(col_blocks)
    table, *groups = tables((tuple(col_blocks), tuple(row_blocks)), lists, col_table_at, num)
    col_groups_at = col_table_at + len(table)
    index, values = torch.cat([lists, *facts, table, *groups]).to(torch.int32), _joined([*col_data, *row_data])
    layout = Layout(
        (m, n),
        num,
        matrix.split_sizes,
        matrix.stored,
        tuple(row_blocks),
        tuple(col_blocks),
        facts_at,
        col_table_at=col_table_at,
        row_table_at=row_table_at,
        col_groups_at=col_groups_at,
        row_groups_at=col_groups_at + len(groups[0]),
    )
    return layout, values, index


def block_values(values: Tensor, block: Block) -> Tensor:
    """(count, stop - start) view of a block's factors."""
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

    Adding at places named by int32 takes torch ten times as long.
    """
    count = block.blocks * block.size if isinstance(block, Batch) else block.size
    return lists.narrow(0, block.list_at, count).long()


def interval_facts(layout: Layout, index: Tensor) -> Tensor:
    """Row widths, row starts, column widths, column starts and original numbers of the components, (5, K) int64."""
    num = layout.num_components
    if not layout.narrow:
        return index.narrow(0, layout.intervals_at, 5 * num).long().view(5, num)
    # Widths go beyond what int16 can say; they are the lower 16 bits.
    return (index.view(torch.int16).narrow(0, 2 * layout.intervals_at, 5 * num).long() & 0xFFFF).view(5, num)


def is_narrow(num_components: int, *lengths: int) -> bool:
    """Do 16 bits hold lists and intervals of this many components, on axes of these lengths."""
    return num_components <= 1 << 15 and max(lengths) < 1 << 16


def halved(words: Tensor) -> Tensor:
    """Two integers of 16 bits to a word, int32; the last word is filled with zeros."""
    low = words.to(torch.int16)  # keeps the lower bits
    return torch.cat([low, low.new_zeros(len(low) % 2)]).view(torch.int32)


def narrowed(layout: Layout, index: Tensor) -> tuple[Layout, Tensor]:
    """Layout and index buffer with 16-bit lists and intervals and without groups, where :func:`is_narrow`."""
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


def quantize(layout: Layout, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a scale per component: symmetric, each of u_k and v_k by its own largest entry.

    Only the product of the two scales of a component matters to the matrix, so that one number is kept. Kernels take
    them with the lists of :func:`narrowed`.

    Args:
        layout: Where everything lies; dense storage has a scale per stored row.
        values: Flat floating-point factors.
        index: int32 index buffer.

    Returns:
        (entries,) int8, and (components,) or (stored rows,) in the dtype of ``values``.
    """
    if layout.dense:
        stored_rows = layout.shape[1 if layout.transposed else 0]
        rows = values.float().view(stored_rows, -1)
        scale = rows.abs().amax(1) / _INT8
        whole = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8)
        return whole.view(-1), scale.to(values.dtype)
    lists, result = all_lists(layout, index), torch.zeros_like(values, dtype=torch.int8)
    product = values.new_ones(layout.num_components, dtype=torch.float32)
    for blocks in (layout.col_blocks, layout.row_blocks):
        largest = torch.zeros_like(product)
        for block in blocks:
            if block.size:
                own = block_list(lists, block)
                rows = block_values(values, block).float().abs().amax(1)
                largest[own] = largest[own].maximum(rows)
        scale = largest / _INT8
        for block in blocks:
            own = scale.index_select(0, block_list(lists, block))[:, None]
            entries = block_values(values, block).float() / torch.where(own > 0, own, 1.0)
            block_values(result, block).copy_(entries.round())
        product *= scale
    return result, product.to(values.dtype)


def _unpack_axis(blocks: tuple[Block, ...], num: int, length: int, values: Tensor, lists: Tensor) -> Tensor:
    """(K, length) factor; a stacked axis folds onto its splits, each component living in one of them."""
    factor = values.new_zeros(num, length)
    for block in blocks:
        at = block.start % length
        rows = block_list(lists, block)
        factor[rows, at : at + block.stop - block.start] = block_values(values, block)
    return factor


def unpack(layout: Layout, values: Tensor, index: Tensor, scales: Tensor | None = None) -> StructuredMatrix:
    """The structured matrix that was packed; a dense one comes back as its rows (m components of 1 x n).

    int8 factors come back as floating-point ones, each of u_k and v_k times the root of the scale.

    Raises:
        ConfigError: For the transpose of a matrix packed with row splits, whose columns are no single cyclic axis.
    """
    m, n = layout.shape
    if layout.dense:
        dense = to_dense(layout, values, index, scales)
        one_row = Intervals(
            torch.ones(m, dtype=torch.int64, device=values.device), torch.arange(m, device=values.device), m
        )
        eye = torch.eye(m, dtype=dense.dtype, device=values.device)
        return StructuredMatrix(eye, dense, one_row, Intervals.full(m, n, values.device), (m,))
    splits = len(layout.split_sizes)
    if layout.transposed and splits > 1:
        raise ConfigError(
            "GBLR tensor: the transpose of a matrix with row splits has no structured form, use to_dense()"
        )
    num, part = layout.num_components, m // splits
    ends = interval_facts(layout, index)
    order = torch.argsort(ends[4])
    if layout.transposed:
        ends = ends[[2, 3, 0, 1]]
    ends = ends[:, order]
    lists = all_lists(layout, index)
    u = _unpack_axis(layout.row_blocks, num, part, values, lists)
    v = _unpack_axis(layout.col_blocks, num, n, values, lists)
    if scales is not None:
        root = scales.sqrt()[:, None]
        u, v = u.to(scales.dtype) * root, v.to(scales.dtype) * root
    return StructuredMatrix(
        u[order],
        v[order],
        Intervals(ends[0], ends[1], part),
        Intervals(ends[2], ends[3], n),
        layout.split_sizes,
    )


def to_dense(layout: Layout, values: Tensor, index: Tensor, scales: Tensor | None = None) -> Tensor:
    """The (m, n) matrix in floating point; traceable (static shapes only)."""
    m, n = layout.shape
    if layout.dense:
        stored = values.view(n, m) if layout.transposed else values.view(m, n)
        if scales is not None:
            stored = stored.to(scales.dtype) * scales[:, None]
        return stored.t() if layout.transposed else stored
    lists = all_lists(layout, index)
    factor = _unpack_axis(layout.col_blocks, layout.num_components, n, values, lists)
    if scales is not None:
        factor = factor.to(scales.dtype) * scales[:, None]
    parts = [
        block_values(values, block).to(factor.dtype).t() @ factor.index_select(0, block_list(lists, block))
        for block in layout.row_blocks
    ]
    return torch.cat(parts)
