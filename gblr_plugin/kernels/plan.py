"""Plans: which storage and which kernel multiply by a structured weight, per number of tokens.

A plan is fixed (from the cost model alone: same structure, same plan, no timing) or measured (the candidates that the cost
model leaves are packed and timed on the actual device and dtype, dense among them, and the fastest is kept).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from ..errors import ConfigError
from ..structure import StructuredMatrix
from .layout import padded_entries
from .product import KERNELS

__all__ = ["BUCKETS", "Plan", "candidates", "fixed_plan"]

BLOCKS = (16, 32, 64, 128, 256, 512)
BUCKETS = (1, 4, 16, 64, 256, 1024)
MEMORY = 1.13  # a layout may store this many times the factor entries; lists and bookkeeping come on top
CALL = 2000.0  # multiply-adds per token that one more block costs, in calls (measured: about 10 us at 256 tokens)
SCATTER = 8.0  # multiply-adds that moving one element of z costs
GAIN = 0.97  # another candidate must be faster than this share of the present best to replace it


@dataclass(frozen=True)
class Plan:
    """Storage and kernels of one weight; hashable and serialisable.

    Args:
        block_rows: Rows per block (within a row split); 0 for dense storage.
        block_cols: Columns per block; 0 for dense storage.
        kernels: (largest number of tokens, kernel name) in increasing order; the last one also serves beyond.
        predicted: Predicted cost of one token, in multiply-adds relative to the dense product, overheads included.
        padding: Stored entries over those inside the intervals.
        device: Device type the kernels were measured on; ``""`` if not measured.
        dtype: Dtype they were measured in, as ``"float32"``; ``""`` if not measured.
        threads: CPU threads at the measurement; 0 if not measured.

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
        kernels: Iterable[Iterable[object]] = values.get("kernels", ())  # type: ignore[assignment]  # checked by __init__
        pairs = tuple((int(str(limit)), str(name)) for limit, name in kernels)
        return cls(**{**values, "kernels": pairs})  # type: ignore[arg-type]  # field names checked above


def _axis_costs(matrix: StructuredMatrix, unit: int) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Predicted cost per block size for rows and for columns, and stored entries under (axis, block)."""
    m, n = matrix.shape
    costs: list[dict[int, float]] = []
    entries: dict[int, float] = {}
    for axis, (intervals, splits, step) in enumerate(((matrix.rows, matrix.row_splits, 1), (matrix.cols, 1, unit))):
        cost: dict[int, float] = {}
        for block in BLOCKS:
            size = max(block // step, 1) * step  # whole channels for a convolution
            padded = padded_entries(intervals, size)
            calls = splits * -(-intervals.length // size)
            cost[size] = padded * (1 + SCATTER / size) + CALL * calls
            entries[axis * (m + n + 1) + size] = padded
            if size >= intervals.length:
                break
        costs.append(cost)
    return costs[0], costs[1], entries


def candidates(matrix: StructuredMatrix, unit: int = 1) -> list[Plan]:
    """Block plans within the memory limit, cheapest first by the cost model; the leanest one if none is within it."""
    matrix = matrix.live()
    m, n = matrix.shape
    rows, cols, entries = _axis_costs(matrix, unit)
    stored = max(matrix.stored, 1)
    plans = [
        Plan(r, c, predicted=(rows[r] + cols[c]) / (m * n), padding=(entries[r] + entries[m + n + 1 + c]) / stored)
        for r in rows
        for c in cols
    ]
    lean = [plan for plan in plans if plan.padding <= MEMORY] or [min(plans, key=lambda plan: plan.padding)]
    return sorted(lean, key=lambda plan: plan.predicted)


def fixed_plan(matrix: StructuredMatrix, unit: int = 1) -> Plan:
    """The plan that the cost model prefers; deterministic, no timing.

    Args:
        matrix: The weight.
        unit: Column blocks are multiples of this (``prod(kernel)`` of a convolution, so that they hold whole channels).

    Returns:
        Dense storage where the factors cost no less than the dense matrix, else blocks.
    """
    m, n = matrix.shape
    if matrix.stored >= m * n:
        return Plan(0, 0, kernels=((BUCKETS[-1], "dense"),), padding=1.0)
    return candidates(matrix, unit)[0]
