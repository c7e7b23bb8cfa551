"""The cost model: it predicts the times of dense and structured products, so that a plan is chosen without timing.

A structured product's time is a sum of :data:`FEATURES`, each times a coefficient; a dense product's time is
interpolated between measured sizes. These numbers hold for one processor, dtype, kernel and number of threads.
:mod:`~gblr_plugin.kernels.fit` measures them on the user's machine; ``recorded_costs.json`` holds those of one machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["BUCKETS", "CASES", "FEATURES", "PLACES", "Costs", "Workload", "case_of", "recorded"]

BUCKETS = (1, 2, 4, 16, 64, 256, 1024)  # tokens; a kernel is chosen for each
CASES = (*map(str, BUCKETS), "unfolded", "pointwise")
"""Linear layers by number of tokens, convolutions that unfold their input, and pointwise convolutions."""
FEATURES = (
    *("start", "threads called", "row entries", "column entries", "far entries"),
    *("list entries", "rows", "columns", "blocks"),
)
"""The time of a structured product is a weighted sum of these; all but the first two are in thousands."""
FAR = 3 << 20  # bytes from which on factors do not fit the second-level cache
PLACES = 14  # output positions of a convolution along each axis
RECORDED = Path(__file__).with_name("recorded_costs.json")


def case_of(taps: int | None, tokens: int) -> str:
    """The name, among :data:`CASES`, of the case to which a product belongs.

    Args:
        taps: ``prod(kernel)`` of a convolution; ``None`` for a linear layer.
        tokens: One of :data:`BUCKETS`; ignored for a convolution.
    """
    return str(tokens) if taps is None else "unfolded" if taps > 1 else "pointwise"


class Workload(NamedTuple):
    """What the time of a structured product depends on.

    Args:
        shape: (m, n) of the matrix.
        rows: (width, active components) of every block of rows.
        cols: (width, active components) of every block of columns.
        dtype: Dtype of the factors.
        kernel: ``"compiled"`` or ``"blocks"``.
        taps: ``prod(kernel)`` of a convolution; ``None`` for a linear layer.
    """

    shape: tuple[int, int]
    rows: list[tuple[int, int]]
    cols: list[tuple[int, int]]
    dtype: torch.dtype
    kernel: str
    taps: int | None = None

    def features(self, tokens: int, threads: int) -> tuple[float, ...]:
        """Values of :data:`FEATURES` for one product that runs on ``threads`` threads."""
        of_rows, of_cols = (sum(width * count for width, count in blocks) for blocks in (self.rows, self.cols))
        single = max(len(self.rows), len(self.cols)) == 1  # all components in one block: nothing to gather
        listed = 0 if single else sum(count for _, count in (*self.rows, *self.cols))
        far = of_rows + of_cols if (of_rows + of_cols) * self.dtype.itemsize > FAR else 0
        shared = False
        if self.kernel == "compiled" and threads > 1:
            from .cpu.numba_team import is_shared  # needs numba

            shared = is_shared(self.dtype, tokens, of_rows + of_cols, threads)
        each = 1000 * threads if shared else 1000
        rest = (*self.shape, len(self.rows) + len(self.cols))
        return 1.0, float(shared), of_rows / each, of_cols / each, far / each, listed / each, *(x / 1000 for x in rest)


@dataclass(frozen=True)
class Costs:
    """Times of products in microseconds.

    Args:
        threads: Number of threads.
        dense: For each of :data:`CASES`, (entries of the matrix, time) of dense products, in increasing order.
        ours: For each of :data:`CASES`, what one unit of each of :data:`FEATURES` adds to the time of a structured
            product.

    Raises:
        ValueError: If a case is missing or unknown, dense products are not in increasing order, or a number is out of
            range.
    """

    threads: int
    dense: Mapping[str, tuple[tuple[float, float], ...]]
    ours: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if set(self.dense) != set(CASES) or set(self.ours) != set(CASES):
            raise ValueError(f"the cases must be {', '.join(CASES)}")
        for points in self.dense.values():
            sizes = [entries for entries, _ in points]
            if not points or sizes != sorted(set(sizes)) or not all(0 < x < math.inf for pair in points for x in pair):
                raise ValueError("dense products must be (entries, time) in increasing order, above 0")
        for coefficients in self.ours.values():
            if len(coefficients) != len(FEATURES) or not all(0 <= x < math.inf for x in coefficients):
                raise ValueError(f"structured products must have {len(FEATURES)} numbers of 0 or more")

    def slowness(self, work: Workload, tokens: int) -> float:
        """Time of the structured product over that of the dense one; ``tokens`` is one of :data:`BUCKETS`."""
        case = case_of(work.taps, tokens)
        found = work.features(tokens if work.taps is None else PLACES**2, self.threads)
        ours = sum(each * number for each, number in zip(self.ours[case], found, strict=True))
        return ours / self._dense(self.dense[case], work.shape[0] * work.shape[1])

    @staticmethod
    def _dense(points: tuple[tuple[float, float], ...], entries: int) -> float:
        """Time by logarithmic interpolation between two measured sizes; beyond them, in proportion to entries."""
        if entries >= points[-1][0]:
            return points[-1][1] * entries / points[-1][0]
        if entries <= points[0][0]:
            return points[0][1]
        above = next(number for number, (size, _) in enumerate(points) if size > entries)
        (size, time), (larger, longer) = points[above - 1 : above + 1]
        return time * math.exp(math.log(longer / time) * math.log(entries / size) / math.log(larger / size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        return {"threads": self.threads, "dense": dict(self.dense), "ours": dict(self.ours)}

    @classmethod
    def from_dict(cls, values: Any) -> Costs:
        """The costs that :meth:`to_dict` wrote; lists may stand in place of tuples.

        Raises:
            ValueError: If the values are no costs.
        """
        try:
            dense = {case: tuple((float(a), float(b)) for a, b in points) for case, points in values["dense"].items()}
            ours = {case: tuple(float(number) for number in row) for case, row in values["ours"].items()}
            return cls(int(values["threads"]), dense, ours)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no costs of products: {error!r}") from error


@cache
def _recorded() -> dict[str, Costs]:
    return {name: Costs.from_dict(values) for name, values in json.loads(RECORDED.read_text("utf-8")).items()}


def recorded(device: torch.device, dtype: torch.dtype, kernel: str) -> Costs:
    """Costs of one thread of one processor with AVX-512, the same on every machine.

    Args:
        device: Ignored.
        dtype: Only its size matters.
        kernel: ``"compiled"`` or ``"blocks"``.
    """
    return _recorded()[f"{kernel} {dtype.itemsize}"]
