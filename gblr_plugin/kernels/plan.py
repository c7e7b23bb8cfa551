"""Plans: which storage and which kernel multiply by a structured weight, per number of tokens.

A plan comes from the cost model alone (same structure, same plan; nothing is timed) or from a measurement, see
:mod:`~gblr_plugin.kernels.measure`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import torch

from ..errors import ConfigError
from ..structure import Intervals, StructuredMatrix
from .compiled import WIDEST, available
from .layout import GROUP, Layout, count_blocks, is_narrow, padded_entries, touched_blocks
from .product import KERNELS

__all__ = ["BUCKETS", "Plan", "candidates", "dense_plan", "fixed_plan", "predicted_cost"]

BLOCKS = (16, 32, 64, 128, 256, 512)
BUCKETS = (1, 4, 16, 64, 256, 1024)  # tokens; a kernel is chosen for each
# Bytes of a layout over those of the bare factors; many small calls of torch would cost more than some padding.
MEMORY = {"compiled": 1.15, "blocks": 1.4}
MATRIX = 1 << 20  # bytes of a dense matrix that may lie beside the factors for some numbers of tokens
# Costs in multiply-adds, 50 to a nanosecond, as measured on a processor with AVX-512. Of a token: moving one element of
# z at a block of rows and at one of columns, where it is written too; one more block (20 us a call at 256 tokens).
MOVE = {"compiled": {4: (0.5, 1.5), 2: (4.0, 3.0)}, "blocks": {8: (4.0, 4.0), 4: (8.0, 8.0), 2: (16.0, 16.0)}}
CALL = {"compiled": 50.0, "blocks": 4096.0}
# Of a multiply-add of ours where the library's are faster.
RATE = {torch.bfloat16: 1.25}
# What a structured product must save to pay, at 1 token, from 4 and from 16: torch's way to a tensor subclass, and our
# kernel's start.
STARTS = (45e3, 110e3, 150e3)
# The same in bfloat16: products of up to so many multiply-adds, and larger ones, which torch itself starts slowly.
SLOW_STARTS, SLOW_FROM = (2e3, -5e5), 8192
# Of one element of x or y, which our kernel lays out anew.
EDGE = 15.0
# Of one element that a convolution unfolds, or only copies where it is pointwise.
UNFOLD, COPY = 150.0, 80.0


@dataclass(frozen=True)
class Plan:
    """Storage and kernels of one weight; hashable and serialisable.

    Args:
        block_rows: Rows per block (within a row split); 0 for dense storage.
        block_cols: Columns per block; 0 for dense storage.
        kernels: (largest number of tokens, kernel name) in increasing order; the last one also serves beyond.
        predicted: Predicted cost of one token in multiply-adds, overheads included, over those of the dense product.
        padding: Stored entries over those inside the intervals.
        device: Device type the kernels were measured on; ``""`` if not measured.
        dtype: Dtype they were measured in, as ``"float32"``; ``""`` if not measured.
        threads: CPU threads at the measurement; 0 if not measured.
        machine: Name of the processor or the GPU at the measurement; ``""`` if not measured.
        speedups: (tokens, time of the dense product over ours) as measured; empty if not measured.

    Raises:
        ConfigError: If block sizes do not fit together or a kernel is unknown.
    """

    block_rows: int
    block_cols: int
    kernels: tuple[tuple[int, str], ...] = ((BUCKETS[-1], "compiled"),)
    predicted: float = field(default=1.0, compare=False)
    padding: float = field(default=1.0, compare=False)
    device: str = ""
    dtype: str = ""
    threads: int = 0
    machine: str = ""
    speedups: tuple[tuple[int, float], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if min(self.block_rows, self.block_cols) < 0 or (self.block_rows == 0) != (self.block_cols == 0):
            raise ConfigError(
                f"plan: block sizes must be positive, or both 0 for dense, got {self.block_rows}, {self.block_cols}"
            )
        if not self.kernels or list(self.kernels) != sorted(self.kernels):
            raise ConfigError(f"plan: kernels must be (tokens, name) pairs in increasing order, got {self.kernels}")
        for _, name in self.kernels:
            if name not in KERNELS:
                raise ConfigError(f"plan: unknown kernel {name!r}, allowed are {', '.join(KERNELS)}")

    @property
    def measured(self) -> bool:
        """Whether the kernels were chosen by timing."""
        return bool(self.device)

    def pinned(self) -> Plan:
        """The same choice as if it had not been measured: nothing measures it again, wherever it goes."""
        return replace(self, device="", dtype="", threads=0, machine="", speedups=())

    def kernel(self, tokens: int) -> str:
        """Name of the kernel for this many tokens."""
        for limit, name in self.kernels:
            if tokens <= limit:
                return name
        return self.kernels[-1][1]

    @property
    def structured_tokens(self) -> tuple[int, int | None] | None:
        """(above, up to) the numbers of tokens between which no more than these take structure; ``None`` if none do."""
        names = [name for _, name in self.kernels]
        found = [number for number, name in enumerate(names) if name != "dense"]
        if not found:
            return None
        first, last = found[0], found[-1]
        return self.kernels[first - 1][0] if first else 0, self.kernels[last][0] if last + 1 < len(names) else None

    @property
    def keeps_matrix(self) -> bool:
        """Does it take the dense matrix beside factors in blocks."""
        return self.block_rows > 0 and any(name == "dense" for _, name in self.kernels)

    def by_factors(self) -> Plan:
        """The same without the dense matrix beside factors in blocks."""
        if not self.keeps_matrix:
            return self
        others = tuple((tokens, name) for tokens, name in self.kernels if name != "dense")
        return replace(self, kernels=others or ((BUCKETS[-1], "compiled"),))

    def to_dict(self) -> dict[str, object]:
        """Plain values, for reports and JSON; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Plan:
        """The plan that :meth:`to_dict` wrote, lists in place of tuples allowed.

        Raises:
            ConfigError: For unknown keys, and as the constructor.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"plan: unknown keys {sorted(unknown)}, allowed are {', '.join(cls.__dataclass_fields__)}"
            )
        pairs: dict[str, object] = {
            key: tuple(tuple(row) for row in _rows(values[key])) for key in ("kernels", "speedups") if key in values
        }
        return cls(**{**values, **pairs})  # type: ignore[arg-type]  # field names checked above


def _rows(value: object) -> Iterable[Iterable[object]]:
    if not isinstance(value, list | tuple) or not all(isinstance(row, list | tuple) for row in value):
        raise ConfigError(f"plan: kernels and speedups must be lists of pairs, got {value!r}")
    return value


@dataclass(frozen=True)
class _Axis:
    """What one block size costs on one axis."""

    block: int
    entries: int  # stored, padding included
    touched: int  # entries of the component lists
    groups: int  # int32 words at most of the groups
    blocks: int


def _cost(entries: int, block: int, blocks: int, kernel: str, move: float) -> float:
    """Multiply-adds that one axis costs a token, overheads included."""
    return entries * (1 + move / block) + CALL[kernel] * blocks


def predicted_cost(layout: Layout, kernel: str, itemsize: int) -> float:
    """Predicted cost of one token with a stored weight over the dense product's; 1.0 where that is what runs.

    Args:
        layout: The storage.
        kernel: Of many tokens.
        itemsize: Bytes of an input's element.
    """
    m, n = layout.shape
    if layout.dense or kernel == "dense":
        return 1.0
    cost = 0.0
    for move, axis in zip(MOVE[kernel][itemsize], (layout.row_blocks, layout.col_blocks), strict=True):
        entries = sum(block.size * (block.stop - block.start) for block in axis)
        cost += _cost(entries, axis[0].stop - axis[0].start, len(axis), kernel, move)
    return cost / (m * n)


def _axis(intervals: Intervals, splits: int, unit: int) -> list[_Axis]:
    sizes = sorted({max(block // unit, 1) * unit for block in BLOCKS})  # whole channels of a convolution
    sizes = sizes[: 1 + sum(size < intervals.length for size in sizes)]
    if intervals.width.is_cuda and sizes[0] <= WIDEST:
        sizes = [size for size in sizes if size <= WIDEST]
    result = []
    for size in sizes:
        blocks = splits * count_blocks(intervals.length, size)
        touched = touched_blocks(intervals, size)
        groups = -(-intervals.num_components // GROUP)
        words = 2 * groups + 5 * min(touched, groups * blocks)
        result.append(_Axis(size, padded_entries(intervals, size), touched, words, blocks))
    return result


def _memory(matrix: StructuredMatrix, rows: _Axis, cols: _Axis, int8: bool) -> float:
    """Bytes stored over those of the bare factors."""
    num, table = matrix.rows.num_components, 5 * (rows.blocks + cols.blocks)
    entries = rows.touched + cols.touched + 5 * num
    item = 1 if int8 else matrix.u.element_size()
    narrow = is_narrow(num, *matrix.shape) and (int8 or matrix.u.is_cpu)
    groups = 0 if narrow else rows.groups + cols.groups
    index = (2 if narrow else 4) * entries + 4 * (table + groups)
    if int8:  # a scale per component
        index += matrix.u.element_size() * num
    return (item * (rows.entries + cols.entries) + index) / (item * max(matrix.stored, 1))


def _all_full(matrix: StructuredMatrix) -> bool:
    """Does every component cover both axes: a low-rank matrix."""
    return matrix.num_components > 0 and all(
        bool((axis.width == axis.length).all()) for axis in (matrix.rows, matrix.cols)
    )


def _whole_plan(matrix: StructuredMatrix) -> Plan:
    """One block per axis (and row split), without padding."""
    m, n = matrix.shape
    cost = matrix.stored + CALL["blocks"] * (matrix.row_splits + 1)
    return Plan(m // matrix.row_splits, n, ((BUCKETS[-1], "blocks"),), predicted=cost / (m * n))


def candidates(matrix: StructuredMatrix, unit: int = 1, kernel: str | None = None, int8: bool = False) -> list[Plan]:
    """Block plans within the memory limit, cheapest first by the cost model; the leanest one if none is within it.

    Args:
        matrix: The weight.
        unit: Column blocks are multiples of this (``prod(kernel)`` of a convolution, so that they hold whole channels).
        kernel: ``"compiled"`` or ``"blocks"``; ``None`` for the compiled one where device, dtype and installed
            packages have it.
        int8: The factors will be int8, which counts for the memory.
    """
    matrix = matrix.live()
    (m, n), item = matrix.shape, matrix.u.element_size()
    if kernel is None:
        kernel = "compiled" if available(matrix.u.device, matrix.u.dtype) else "blocks"
    if _all_full(matrix) and (kernel == "blocks" or matrix.u.is_cuda):
        # Two plain products per split; a library's are the fastest there are.
        return [_whole_plan(matrix)]
    rows, cols = _axis(matrix.rows, matrix.row_splits, 1), _axis(matrix.cols, 1, unit)
    pairs = [(r, c) for r in rows for c in cols]
    lean = [(r, c) for r, c in pairs if _memory(matrix, r, c, int8) <= MEMORY[kernel]]
    lean = lean or [min(pairs, key=lambda pair: _memory(matrix, pair[0], pair[1], int8))]
    plans = [
        Plan(
            r.block,
            c.block,
            ((BUCKETS[-1], kernel),),
            predicted=sum(
                _cost(a.entries, a.block, a.blocks, kernel, move)
                for a, move in zip((r, c), MOVE[kernel][item], strict=True)
            )
            / (m * n),
            padding=(r.entries + c.entries) / max(matrix.stored, 1),
        )
        for r, c in lean
    ]
    return sorted(plans, key=lambda plan: plan.predicted)


def _dense_pays(plan: Plan, matrix: StructuredMatrix, tokens: int, taps: int | None) -> bool:
    """Is the dense product of this many tokens foreseen to be faster; ``taps`` of a convolution."""
    (m, n), dtype, kernel = matrix.shape, matrix.u.dtype, plan.kernels[-1][1]
    if matrix.u.is_cuda:  # two launches for one, and nothing measured
        return m * n * dtype.itemsize <= MATRIX
    cost = plan.predicted
    if kernel == "compiled":
        start = STARTS[(tokens >= 4) + (tokens >= 16)]
        if dtype == torch.bfloat16:
            start = SLOW_STARTS[m * n * tokens > SLOW_FROM]
        cost = cost * RATE.get(dtype, 1.0) + EDGE / m + EDGE / n
    else:  # calls do not depend on the number of tokens
        calls = CALL[kernel] * (-(-m // plan.block_rows) + -(-n // plan.block_cols))
        start, cost = calls * 256, cost - calls / (m * n)
    if taps is not None:
        cost += (UNFOLD if taps > 1 else COPY) / m
    return (1 - cost) * m * n * tokens < start


def fixed_plan(matrix: StructuredMatrix, taps: int | None = None, int8: bool = False, beside: bool = True) -> Plan:
    """The plan that the cost model prefers; no timing: same structure, dtype and installed packages, same plan.

    Args:
        matrix: The weight.
        taps: Of a convolution, ``prod(kernel)``; ``None`` for a linear weight.
        int8: As in :func:`candidates`. Factors are made so for the memory, and nothing lies beside them.
        beside: Let the matrix lie beside the factors: where it is small, for numbers of tokens at which structure saves
            less than a structured product takes to start; where it is large, if dense is foreseen to be faster at many.

    Returns:
        Blocks; dense storage where the factors cost no less than the dense matrix.
    """
    m, n = matrix.shape
    if matrix.stored >= m * n:
        return dense_plan()
    best = candidates(matrix, taps or 1, int8=int8)[0]
    if int8 or not beside:
        return best
    many, kernel = BUCKETS[-1], best.kernels[-1][1]
    if taps is not None:
        names = [(many, "dense" if _dense_pays(best, matrix, many, taps) else kernel)]
    else:  # what pays at a number of tokens is taken up to the next
        found = ["dense" if _dense_pays(best, matrix, tokens, None) else kernel for tokens in BUCKETS]
        limits = [*(tokens - 1 for tokens in BUCKETS[1:]), many]
        names = [
            (limit, name)
            for number, (limit, name) in enumerate(zip(limits, found, strict=True))
            if number + 1 == len(found) or found[number + 1] != name
        ]
    kept = m * n * matrix.u.element_size() <= MATRIX or names[-1][1] == "dense"
    return replace(best, kernels=tuple(names)) if kept else best


def dense_plan() -> Plan:
    """The plan that stores and multiplies by the dense matrix."""
    return Plan(0, 0, ((BUCKETS[-1], "dense"),))
