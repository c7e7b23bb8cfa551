"""Plans: which storage and which kernel multiply by a structured weight, per number of tokens.

A plan comes from the cost model alone (same structure, same plan; nothing is timed) or from a measurement, see
:mod:`~gblr_plugin.kernels.measure`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from ..errors import ConfigError
from ..structure import Intervals, StructuredMatrix
from .compiled import WIDEST, available
from .layout import GROUP, count_blocks, padded_entries, touched_blocks
from .product import KERNELS

__all__ = ["BUCKETS", "Plan", "candidates", "dense_plan", "fixed_plan"]

BLOCKS = (16, 32, 64, 128, 256, 512)
BUCKETS = (1, 4, 16, 64, 256, 1024)  # tokens; a kernel is chosen for each
MEMORY = 1.15  # bytes of a layout over those of the bare factors
# Costs in multiply-adds: moving one element of z, and one more block per token (about 10 us a call at 256 tokens).
MOVE = {"compiled": 1.0, "blocks": 8.0}
CALL = {"compiled": 50.0, "blocks": 2000.0}


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

    def kernel(self, tokens: int) -> str:
        """Name of the kernel for this many tokens."""
        for limit, name in self.kernels:
            if tokens <= limit:
                return name
        return self.kernels[-1][1]

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
    lists: int  # int32 words at most: component lists, table of blocks, groups
    blocks: int

    def cost(self, kernel: str, itemsize: int) -> float:
        # Narrow dtypes multiply faster, but z moves at the same speed.
        return self.entries * (1 + MOVE[kernel] * 4 / itemsize / self.block) + CALL[kernel] * self.blocks


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
        words = touched + 5 * blocks + 2 * groups + 5 * min(touched, groups * blocks)
        result.append(_Axis(size, padded_entries(intervals, size), words, blocks))
    return result


def _memory(matrix: StructuredMatrix, rows: _Axis, cols: _Axis) -> float:
    """Bytes stored over those of the bare factors."""
    item = matrix.u.element_size()
    words = rows.lists + cols.lists + 5 * matrix.rows.num_components
    return (item * (rows.entries + cols.entries) + 4 * words) / (item * max(matrix.stored, 1))


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


def candidates(matrix: StructuredMatrix, unit: int = 1, kernel: str | None = None) -> list[Plan]:
    """Block plans within the memory limit, cheapest first by the cost model; the leanest one if none is within it.

    Args:
        matrix: The weight.
        unit: Column blocks are multiples of this (``prod(kernel)`` of a convolution, so that they hold whole channels).
        kernel: ``"compiled"`` or ``"blocks"``; ``None`` for the compiled one where device, dtype and installed
            packages have it.
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
    lean = [pair for pair in pairs if _memory(matrix, *pair) <= MEMORY]
    lean = lean or [min(pairs, key=lambda pair: _memory(matrix, *pair))]
    plans = [
        Plan(
            r.block,
            c.block,
            ((BUCKETS[-1], kernel),),
            predicted=(r.cost(kernel, item) + c.cost(kernel, item)) / (m * n),
            padding=(r.entries + c.entries) / max(matrix.stored, 1),
        )
        for r, c in lean
    ]
    return sorted(plans, key=lambda plan: plan.predicted)


def fixed_plan(matrix: StructuredMatrix, unit: int = 1) -> Plan:
    """The plan that the cost model prefers; no timing: same structure, dtype and installed packages, same plan.

    Args:
        matrix: The weight.
        unit: As in :func:`candidates`.

    Returns:
        Dense storage where the factors cost no less than the dense matrix, else blocks.
    """
    m, n = matrix.shape
    return dense_plan() if matrix.stored >= m * n else candidates(matrix, unit)[0]


def dense_plan() -> Plan:
    """The plan that stores and multiplies by the dense matrix."""
    return Plan(0, 0, ((BUCKETS[-1], "dense"),))
