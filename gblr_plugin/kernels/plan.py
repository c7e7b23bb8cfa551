"""Kernel plans: the block sizes of a structured weight, and the kernel for each number of tokens.

This module chooses a plan by the cost model, whose numbers are measured once per machine
(:mod:`~gblr_plugin.kernels.fit`); :mod:`~gblr_plugin.kernels.measure` chooses it by timing the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

import torch

from ..errors import ConfigError
from ..matrix.structure import Intervals, StructuredMatrix
from .compiled import WIDEST, available
from .costs import BUCKETS, Costs, Workload, recorded
from .layout import GROUP, Layout, is_narrow, set_fields
from .packing import active_counts
from .product import KERNELS

__all__ = ["BUCKETS", "CostsOf", "Plan", "candidates", "dense_plan", "fixed_plan", "predicted_cost", "workload_of"]

BLOCKS = (16, 32, 64, 128, 256, 512)
# Memory limit of a plan: bytes of the layout over those of the bare factors. It is higher for torch operations, which
# pad all blocks to equally many components.
MEMORY = {"compiled": 1.15, "blocks": 1.55}
MATRIX = 1 << 20  # bytes of a dense matrix up to which its one launch is as fast as the two launches of its factors
# Costs per token in multiply-adds. z holds one element per component: the product of the column factors with the input.
# MOVE, by kernel and bytes of an element: a block of rows reads one element of z; a block of columns also writes it.
# CALL: one more block.
MOVE = {"compiled": {4: (0.5, 1.5), 2: (7.0, 5.0)}, "blocks": {8: (25.0, 25.0), 4: (50.0, 50.0), 2: (65.0, 65.0)}}
CALL = 50.0
# The dense matrix is kept beside the factors if, at some number of tokens, the structured product is predicted to take
# more than LOSS times the dense product's time. The dense product then serves all numbers of tokens at which the
# structured product takes more than DOUBT times as long. Predictions are right within about 10%.
LOSS, DOUBT = 0.95, 0.85
# Types of a plan's fields; those that are not listed are tuples.
_KINDS = {
    "block_rows": int,
    "block_cols": int,
    "predicted": float,
    "padding": float,
    "device": str,
    "dtype": str,
    "threads": int,
    "machine": str,
}


@dataclass(frozen=True)
class Plan:
    """Block sizes and kernels of one weight; hashable and serialisable.

    Args:
        block_rows: Rows per block (within a row split); 0 for dense storage.
        block_cols: Columns per block; 0 for dense storage.
        kernels: (largest number of tokens, kernel name) in increasing order; the last kernel also serves more tokens.
        predicted: Predicted cost of one token in multiply-adds, overheads included, over those of the dense product.
        padding: Entries with padding over those inside the intervals.
        device: Device type on which the kernels were measured; ``""`` if not measured.
        dtype: Dtype in which they were measured, as ``"float32"``; ``""`` if not measured.
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
        for name, value in vars(self).items():
            kind = _KINDS.get(name, tuple)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(f"plan: {name} must be of type {kind.__name__}, got {value!r}")
        if min(self.block_rows, self.block_cols) < 0 or (self.block_rows == 0) != (self.block_cols == 0):
            raise ConfigError(
                f"plan: block sizes must be positive, or both 0 for dense, got {self.block_rows}, {self.block_cols}"
            )
        pairs = [*self.kernels, *self.speedups]
        if not self.kernels or any(type(pair) is not tuple or len(pair) != 2 for pair in pairs):
            raise ConfigError(
                f"plan: kernels and speedups must be pairs of values, got {self.kernels}, {self.speedups}"
            )
        for tokens, name in self.kernels:
            if type(tokens) is not int:
                raise ConfigError(f"plan: numbers of tokens must be integers, got {tokens!r}")
            if name not in KERNELS:
                raise ConfigError(f"plan: unknown kernel {name!r}, allowed are {', '.join(KERNELS)}")
        if list(self.kernels) != sorted(self.kernels):
            raise ConfigError(f"plan: kernels must be (tokens, name) pairs in increasing order, got {self.kernels}")

    def __setstate__(self, state: dict[str, object]) -> None:
        set_fields(self, state)

    @property
    def measured(self) -> bool:
        """Whether the kernels were chosen by timing the weight."""
        return bool(self.device)

    def unmeasured(self) -> Plan:
        """The same plan without the facts of its measurement, so that no other machine replaces it by measuring."""
        return replace(self, device="", dtype="", threads=0, machine="", speedups=())

    def kernel(self, tokens: int) -> str:
        """Name of the kernel for this many tokens."""
        for limit, name in self.kernels:
            if tokens <= limit:
                return name
        return self.kernels[-1][1]

    @property
    def dense_tokens(self) -> tuple[tuple[int, int | None], ...]:
        """Ranges of numbers of tokens that the dense kernel serves, as (above, up to); from -1, and up to ``None``."""
        spans: list[tuple[int, int | None]] = []
        above = -1
        for number, (limit, name) in enumerate(self.kernels):
            to = limit if number + 1 < len(self.kernels) else None
            if name == "dense" and spans and spans[-1][1] == above:
                spans[-1] = spans[-1][0], to
            elif name == "dense":
                spans.append((above, to))
            above = limit
        return tuple(spans)

    @property
    def even(self) -> bool:
        """Whether all blocks of a linear weight are padded to equally many components, for one batched product."""
        names = {name for _, name in self.kernels}
        return "blocks" in names and "compiled" not in names

    @property
    def keeps_matrix(self) -> bool:
        """Whether the dense matrix is kept beside the factors, for some or all numbers of tokens."""
        return self.block_rows > 0 and any(name == "dense" for _, name in self.kernels)

    def by_factors(self) -> Plan:
        """The plan without the dense matrix beside the factors."""
        if not self.keeps_matrix:
            return self
        others = tuple((tokens, name) for tokens, name in self.kernels if name != "dense")
        return replace(self, kernels=others or ((BUCKETS[-1], "compiled"),))

    def to_dict(self) -> dict[str, object]:
        """Plain values, for reports and JSON; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Plan:
        """The plan that :meth:`to_dict` wrote; lists may stand in place of tuples.

        Raises:
            ConfigError: If a key is unknown or the constructor refuses a value.
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
    entries: int  # entries of the factor, padding included
    listed: int  # entries of the component lists
    groups: int  # most int32 words that the groups take
    blocks: int


def _cost(entries: int, block: int, blocks: int, move: float) -> float:
    """Multiply-adds that one axis costs a token, overheads included."""
    return entries * (1 + move / block) + CALL * blocks


def predicted_cost(layout: Layout, kernel: str, itemsize: int) -> float:
    """Predicted cost of one token over that of the dense product; 1.0 if the layout is kept dense.

    Args:
        layout: Layout of the weight.
        kernel: Kernel for many tokens.
        itemsize: Bytes of an input's element.
    """
    m, n = layout.shape
    if layout.dense or kernel == "dense":
        return 1.0
    cost = 0.0
    moves = MOVE[kernel].get(itemsize, MOVE["blocks"][itemsize])  # torch operations serve where nothing is compiled
    for move, axis in zip(moves, (layout.row_blocks, layout.col_blocks), strict=True):
        entries = sum(block.size * (block.stop - block.start) for block in axis)
        cost += _cost(entries, axis[0].stop - axis[0].start, len(axis), move)
    return cost / (m * n)


def _axis(intervals: Intervals, split_sizes: tuple[int, ...], taps: int, even: bool) -> list[_Axis]:
    """The block sizes of an axis, which are multiples of the taps of a convolution."""
    sizes = sorted({max(block // taps, 1) * taps for block in BLOCKS})
    sizes = sizes[: 1 + sum(size < intervals.length for size in sizes)]
    if intervals.width.is_cuda and sizes[0] <= WIDEST:
        sizes = [size for size in sizes if size <= WIDEST]
    result = []
    for size in sizes:
        found = active_counts(intervals, size, split_sizes, even)
        entries, listed = sum(width * count for width, count in found), sum(count for _, count in found)
        groups = -(-intervals.num_components // GROUP)
        words = 2 * groups + 5 * min(listed, groups * len(found))
        result.append(_Axis(size, entries, listed, words, len(found)))
    return result


def _memory(matrix: StructuredMatrix, rows: _Axis, cols: _Axis, int8: bool) -> float:
    """Bytes of all buffers over those of the bare factors."""
    num, table = matrix.rows.num_components, 5 * (rows.blocks + cols.blocks)
    entries = rows.listed + cols.listed + 5 * num
    item = 1 if int8 else matrix.u.element_size()
    narrow = is_narrow(num, *matrix.shape) and (int8 or matrix.u.is_cpu)
    groups = 0 if narrow else rows.groups + cols.groups
    index = (2 if narrow else 4) * entries + 4 * (table + groups)
    if int8:  # a scale per component
        index += matrix.u.element_size() * num
    return (item * (rows.entries + cols.entries) + index) / (item * max(matrix.stored, 1))


def _all_full(matrix: StructuredMatrix) -> bool:
    """Whether every component covers both axes: a low-rank matrix."""
    return matrix.num_components > 0 and all(
        bool((axis.width == axis.length).all()) for axis in (matrix.rows, matrix.cols)
    )


def _single_blocks(matrix: StructuredMatrix) -> Plan:
    """One block per axis (and row split), without padding."""
    m, n = matrix.shape
    cost = matrix.stored + CALL * (matrix.row_splits + 1)
    return Plan(m // matrix.row_splits, n, ((BUCKETS[-1], "blocks"),), predicted=cost / (m * n))


def candidates(
    matrix: StructuredMatrix, taps: int | None = None, kernel: str | None = None, int8: bool = False
) -> list[Plan]:
    """Plans within the memory limit, cheapest first; the plan of least memory if none is within the limit.

    Args:
        matrix: The weight.
        taps: ``prod(kernel)`` of a convolution, of which blocks of columns hold complete channels; ``None`` for a
            linear weight.
        kernel: ``"compiled"`` or ``"blocks"``; ``None`` for the compiled one where device, dtype and installed
            packages have it.
        int8: Whether the factors will be int8, which take less memory.
    """
    matrix = matrix.live()
    (m, n), item = matrix.shape, matrix.u.element_size()
    if kernel is None:
        kernel = "compiled" if available(matrix.u.device, matrix.u.dtype) else "blocks"
    if _all_full(matrix) and (kernel == "blocks" or matrix.u.is_cuda):
        # A low-rank matrix takes two plain products per row split, for which torch's matrix products are fastest.
        return [_single_blocks(matrix)]
    even = kernel == "blocks" and taps is None
    rows = _axis(matrix.rows, matrix.split_sizes, 1, even)
    cols = _axis(matrix.cols, (matrix.num_components,), taps or 1, even)
    pairs = [(r, c) for r in rows for c in cols]
    within = [(r, c) for r, c in pairs if _memory(matrix, r, c, int8) <= MEMORY[kernel]]
    within = within or [min(pairs, key=lambda pair: _memory(matrix, pair[0], pair[1], int8))]
    plans = [
        Plan(
            r.block,
            c.block,
            ((BUCKETS[-1], kernel),),
            predicted=sum(
                _cost(a.entries, a.block, a.blocks, move) for a, move in zip((r, c), MOVE[kernel][item], strict=True)
            )
            / (m * n),
            padding=(r.entries + c.entries) / max(matrix.stored, 1),
        )
        for r, c in within
    ]
    return sorted(plans, key=lambda plan: plan.predicted)


CostsOf = Callable[[torch.device, torch.dtype, str], Costs]
"""Costs of products on a device, in a dtype, by a kernel."""


def workload_of(plan: Plan, matrix: StructuredMatrix, taps: int | None) -> Workload:
    """The cost model's description of a weight that is multiplied under a plan.

    Args:
        plan: Block sizes, and the kernel for many tokens.
        matrix: The weight.
        taps: ``prod(kernel)`` of a convolution; ``None`` for a linear weight.
    """
    matrix, even = matrix.live(), plan.even and taps is None
    rows = active_counts(matrix.rows, plan.block_rows, matrix.split_sizes, even)
    cols = active_counts(matrix.cols, plan.block_cols, (matrix.num_components,), even)
    return Workload(matrix.shape, rows, cols, matrix.u.dtype, plan.kernels[-1][1], taps)


def _slowness(plan: Plan, matrix: StructuredMatrix, taps: int | None, costs: CostsOf) -> Callable[[int], float]:
    """A function of the number of tokens: predicted time of the structured product over that of the dense product.

    Tests replace it by a constant, so that every plan is structured (0.0) or dense (2.0).

    Args:
        plan: Block sizes, and the kernel for many tokens.
        matrix: The weight.
        taps: ``prod(kernel)`` of a convolution; ``None`` for a linear weight.
        costs: Gives the times of products.
    """
    shape, factors = matrix.shape, matrix.u
    if factors.is_cuda:  # costs are not measured on GPUs
        small = shape[0] * shape[1] * factors.element_size() <= MATRIX
        return lambda tokens: 2.0 if small else 0.0
    here, work = costs(factors.device, factors.dtype, plan.kernels[-1][1]), workload_of(plan, matrix, taps)
    return lambda tokens: here.slowness(work, tokens)


def fixed_plan(
    matrix: StructuredMatrix,
    taps: int | None = None,
    int8: bool = False,
    beside: bool = True,
    costs: CostsOf = recorded,
) -> Plan:
    """The plan that the cost model prefers. Equal structures, dtypes and costs get equal plans.

    Args:
        matrix: The weight.
        taps: ``prod(kernel)`` of a convolution; ``None`` for a linear weight.
        int8: As in :func:`candidates`. Factors are made int8 to save memory, so no matrix is kept beside them.
        beside: Keep the dense matrix beside the factors if the dense product is predicted to be faster at some number
            of tokens. It then multiplies at all numbers of tokens at which structure saves little.
        costs: Times of products; by default the recorded ones, which are the same everywhere.

    Returns:
        Blocks; dense storage where the factors cost no less than the dense matrix.
    """
    m, n = matrix.shape
    if matrix.stored >= m * n:
        return dense_plan()
    best = candidates(matrix, taps, int8=int8)[0]
    if int8 or not beside:
        return best
    slowness, many, kernel = _slowness(best, matrix, taps, costs), BUCKETS[-1], best.kernels[-1][1]
    buckets = BUCKETS if taps is None else (many,)
    found = [slowness(tokens) for tokens in buckets]
    if max(found) <= LOSS:
        return best
    names = ["dense" if slow > DOUBT else kernel for slow in found]
    limits = [*(tokens - 1 for tokens in buckets[1:]), many]  # each choice holds up to the next number of tokens
    kernels = [
        (limit, name)
        for number, (limit, name) in enumerate(zip(limits, names, strict=True))
        if number + 1 == len(names) or names[number + 1] != name
    ]
    return replace(best, kernels=tuple(kernels))


def dense_plan() -> Plan:
    """The plan that stores and multiplies by the dense matrix."""
    return Plan(0, 0, ((BUCKETS[-1], "dense"),))
