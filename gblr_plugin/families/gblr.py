"""GBLR itself as a family, so that it is chosen by name like its rivals.

As a family, its structure is that of a decomposition, and only its factors train. To learn the structure, prepare the
model with :class:`gblr_plugin.LayerSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..decomposition import decompose, initialise
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from .base import FamilyMatrix

__all__ = ["Gblr"]


@dataclass(frozen=True, eq=False)
class Gblr(FamilyMatrix):
    """Sum of rank-1 blocks anywhere (Lee & Kim 2024, Eq. 2): the sum of their two widths in multiply-adds.

    Options:
        method, calibration, align, max_components, row_splits, seed: As :func:`gblr_plugin.decompose` takes them.
        trains: Whether its factors are going to train, for which the low-rank part keeps trapezoid form.

    Args:
        structured: The matrix.
        align: Tile of rows and columns to which intervals snap.
    """

    name = "gblr"
    structured: StructuredMatrix
    align: int | tuple[int, int] = 1

    @classmethod
    def _project(
        cls,
        weight: Tensor,
        max_multiply_adds: int,
        *,
        method: str = "gblr",
        calibration: Tensor | Metric | None = None,
        align: int | tuple[int, int] = 1,
        max_components: int | None = None,
        row_splits: int = 1,
        seed: int = 0,
        trains: bool = False,
    ) -> Gblr:
        budget = max_multiply_adds / weight.numel()
        shared: dict[str, Any] = {"align": align, "row_splits": row_splits, "seed": seed, "calibration": calibration}
        if trains:
            matrix = initialise(weight, method, budget=budget, num_components=max_components, **shared)
        else:
            matrix = decompose(weight, budget, method=method, max_components=max_components, **shared)
        return cls(matrix, align)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.structured.shape

    @property
    def stored(self) -> int:
        """Entries inside the intervals."""
        return self.structured.stored

    def factors(self) -> dict[str, Tensor]:
        """U (K, m / s) and V (K, n), zero outside the intervals."""
        return {"u": self.structured.u, "v": self.structured.v}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Gblr:
        """The same intervals with other factors."""
        old = self.structured
        return Gblr(
            StructuredMatrix.from_factors(factors["u"], factors["v"], old.rows, old.cols, old.split_sizes), self.align
        )

    def to_dense(self) -> Tensor:
        """The sum of the blocks."""
        return self.structured.to_dense()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two products through K intermediate values."""
        return self.structured.linear(x, bias)

    def to_structured(self) -> StructuredMatrix:
        """The matrix itself."""
        return self.structured
