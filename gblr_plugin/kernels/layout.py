"""Block storage of a GBLR matrix: fixed blocks of rows and columns, each with the list of its active components.

Column block J keeps V[list, J] and row block I keeps U[list, I], both dense and row-major, where ``list`` names the
components whose interval meets the block. A product takes a few dense products per block. Intervals that wrap around
cost no more than others. If an interval ends inside a block, the rest of the block's row is padded with zeros; if all
intervals end on block borders, there is no padding.

This file describes the layout; :mod:`~gblr_plugin.kernels.packing` lays matrices out, and
:mod:`~gblr_plugin.kernels.buffers` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ConfigError

__all__ = ["GROUP", "Batch", "Block", "Layout", "Sizes", "batches", "is_narrow", "set_fields"]

GROUP = 64  # components per group


class Block(NamedTuple):
    """One block of an axis: indices ``start:stop``, its component list and the place of its factor entries."""

    start: int
    stop: int
    size: int  # number of active components
    list_at: int  # first entry of the list in the index buffer
    data_at: int  # first entry of the (size, stop - start) factors in the flat factors
    first: int  # first component where the list is consecutive numbers, else -1


class Batch(NamedTuple):
    """Consecutive blocks of one shape, whose lists and factors are consecutive too."""

    start: int
    blocks: int
    width: int  # of each block
    size: int  # active components of each block
    list_at: int
    data_at: int
    first: int  # as in a block; -1 for more than one block


class Sizes(NamedTuple):
    """The numbers of a layout that compiled kernels and the operator take."""

    cols_at: int  # first word of the table of column blocks
    cols: int  # number of column blocks
    col_groups_at: int
    col_width: int  # of the largest column block
    rows_at: int
    rows: int
    row_groups_at: int
    row_width: int
    components: int
    out_features: int
    entries: int  # multiply-adds of one token

    def transposed(self, in_features: int) -> Sizes:
        """The numbers of the transposed matrix, which has ``in_features`` rows."""
        return Sizes(*self[4:8], *self[:4], self.components, in_features, self.entries)


def batches(blocks: tuple[Block, ...]) -> list[Batch]:
    """The blocks of an axis in as few batches as possible; torch multiplies by each in one product."""
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
    """The places of all blocks, lists and intervals in the flat buffers.

    A layout is hashable and holds no tensors, so that traces see its values as constants.

    Args:
        shape: (m, n) of the matrix.
        num_components: K, the components that are kept (those without cost are dropped).
        split_sizes: Components of each row split.
        stored: Factor entries inside the intervals, without padding.
        row_blocks: Blocks of U; empty if ``dense``.
        col_blocks: Blocks of V; empty if ``dense``.
        intervals_at: First word of the index buffer of the (5, K) row widths and starts, column widths and starts, and
            original numbers of the components; see :func:`~gblr_plugin.kernels.buffers.interval_facts`.
        col_table_at: First word of (start, width, size, list_at, data_at) of each column block.
        row_table_at: First word of the same table of the row blocks.
        col_groups_at: First word of the groups of components and the column blocks that they meet; 0 if ``narrow``.
        row_groups_at: First word of the groups of components and the row blocks that they meet; 0 if ``narrow``.
        dense: The factors are the (m, n) matrix itself, row-major (or (n, m) if ``transposed``).
        transposed: The matrix is the transpose of the one that was packed.
        narrow: Lists and intervals are 16 bits wide, two to a word, and there are no groups, which keeps the index
            buffer small. Kernels for CUDA do not take such lists.

    Raises:
        ConfigError: If the numbers are not those of a layout that :mod:`~gblr_plugin.kernels.packing` can make. Files
            may hold any numbers; this check makes every layout that exists sound.
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
    def sizes(self) -> Sizes:
        """What kernels take of a layout that is not dense."""
        rows, cols = self.row_blocks, self.col_blocks
        of_cols = self.col_table_at, len(cols), self.col_groups_at, cols[0].stop - cols[0].start
        of_rows = self.row_table_at, len(rows), self.row_groups_at, rows[0].stop - rows[0].start
        return Sizes(*of_cols, *of_rows, self.num_components, self.shape[0], self.entries)

    @property
    def padding(self) -> float:
        """Entries with padding over those inside the intervals; 1.0 when every interval ends on block borders."""
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
            sound = _has_numbers(self) and _is_sound(self)
        except (TypeError, ValueError, AttributeError, IndexError):  # no numbers, or tuples of another length
            sound = False
        if not sound:
            raise ConfigError("layout: its blocks and places do not follow from one another")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone, without cached properties."""
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
    """Fill a new object of a frozen dataclass from what a file claims, with the checks of its constructor.

    Raises:
        ConfigError: If the object has values already, a field is unknown or missing, or the constructor refuses one.
    """
    if not isinstance(state, dict) or vars(target):
        raise ConfigError(f"{type(target).__name__.lower()}: its state is damaged")
    try:
        type(target).__init__(target, **state)
    except TypeError as error:
        raise ConfigError(f"{type(target).__name__.lower()}: its state is damaged: {error}") from error


def is_narrow(num_components: int, *lengths: int) -> bool:
    """Whether 16 bits hold lists and intervals of this many components, on axes of these lengths."""
    return num_components <= 1 << 15 and max(lengths) < 1 << 16


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _places(layout: Layout) -> tuple[int, ...]:
    tables = layout.intervals_at, layout.col_table_at, layout.row_table_at
    return *tables, layout.col_groups_at, layout.row_groups_at


def _has_numbers(layout: Layout) -> bool:
    """Whether the fields of a layout, which may be anything, are of their types."""
    flags = layout.dense, layout.transposed, layout.narrow
    counts = (*layout.shape, layout.num_components, layout.stored, *layout.split_sizes, *_places(layout))
    tuples = layout.shape, layout.split_sizes, layout.row_blocks, layout.col_blocks
    return (
        all(type(flag) is bool for flag in flags)
        and all(map(_is_count, counts))
        and all(type(value) is tuple for value in tuples)
    )


def _is_sound(layout: Layout) -> bool:
    """Whether the numbers of a layout follow from one another."""
    (m, n), rows, cols = layout.shape, layout.row_blocks, layout.col_blocks
    intervals_at, col_table, row_table, col_groups, row_groups = _places(layout)
    if layout.transposed:
        (m, n), (rows, cols) = (n, m), (cols, rows)
        (row_table, col_table), (row_groups, col_groups) = (col_table, row_table), (col_groups, row_groups)
    num, splits = layout.num_components, len(layout.split_sizes)
    if min(m, n) < 1 or layout.stored > m * n:
        return False
    if layout.dense:
        facts = (num, layout.split_sizes, layout.stored, rows, cols, layout.narrow)
        return facts == (m, (m,), m * n, (), (), False) and not any(_places(layout))
    if not splits or sum(layout.split_sizes) != num or m % splits or (layout.narrow and not is_narrow(num, m, n)):
        return False
    col_end = _end_of(cols, n, (num,), (0, 0))
    row_end = None if col_end is None else _end_of(rows, m // splits, layout.split_sizes, col_end)
    if row_end is None or max(row_end) >= 1 << 31:
        return False
    listed = row_end[0]
    lists, intervals = (-(-listed // 2), -(-5 * num // 2)) if layout.narrow else (listed, 5 * num)
    first_table = lists + intervals
    if (intervals_at, col_table, row_table) != (lists, first_table, first_table + 5 * len(cols)):
        return False
    if layout.narrow:
        return col_groups == row_groups == 0
    pairs, rest = divmod(row_groups - col_groups - 2 * -(-num // GROUP), 5)
    return col_groups == row_table + 5 * len(rows) and not rest and 0 <= pairs <= listed


def _end_of(
    blocks: tuple[Block, ...], length: int, split_sizes: tuple[int, ...], at: tuple[int, int]
) -> tuple[int, int] | None:
    """Where the last list and the last factors of an axis end, if its blocks follow one another over each split.

    Args:
        blocks: Blocks of one axis.
        length: Length of each split.
        split_sizes: Components of each split.
        at: Where the first list and the first factors begin.

    Returns:
        First word after the last list and first entry after the last factors; ``None`` if a block is not where it must
        be, or names components that do not exist.
    """
    per_split = len(blocks) // len(split_sizes)
    if not blocks or per_split * len(split_sizes) != len(blocks) or not all(map(_is_count, blocks[0][:5])):
        return None
    width, first = blocks[0].stop - blocks[0].start, 0
    if width < 1 or per_split != -(-length // width):
        return None
    list_at, data_at = at
    for number, block in enumerate(blocks):
        split, place = divmod(number, per_split)
        start, stop, components = place * width, min((place + 1) * width, length), split_sizes[split]
        if type(block) is not Block or any(type(value) is not int for value in block):
            return None
        if not 0 <= block.size <= components:
            return None
        if block[:5] != (split * length + start, split * length + stop, block.size, list_at, data_at):
            return None
        if block.first != -1 and not (block.size and first <= block.first <= first + components - block.size):
            return None
        list_at, data_at = list_at + block.size, data_at + block.size * (stop - start)
        if place + 1 == per_split:
            first += components
    return list_at, data_at
