"""What every decomposition method is given: one matrix, what it may cost, and where intervals may begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..structure import Intervals, StructuredMatrix, multiply_adds
from .metric import Metric
from .triplets import singular_triplets

__all__ = ["Grid", "Problem"]


@dataclass(frozen=True)
class Grid:
    """An axis of ``length`` indices cut into cells of ``tile`` indices, at which intervals begin and end.

    The last cell is short where the tile does not divide the length; intervals then do not wrap, and one that contains
    the last cell is as wide as whole tiles (its excess wraps), so that every width is a multiple of the tile or the
    whole axis.
    """

    length: int
    tile: int

    @property
    def cells(self) -> int:
        """Number of cells, the last one possibly short."""
        return -(-self.length // self.tile)

    @property
    def cyclic(self) -> bool:
        """Whether intervals of cells may wrap around."""
        return self.length % self.tile == 0

    def widths(self, cells: Tensor) -> Tensor:
        """Number of indices, int64, covered by intervals of so many cells."""
        return (cells * self.tile).clamp(max=self.length)

    def intervals(self, cells: Tensor, start: Tensor) -> Intervals:
        """Intervals of ``cells`` cells from cell ``start``; both (K,) int64."""
        width = self.widths(cells)
        begin = torch.where((width > 0) & (width < self.length), start * self.tile, torch.zeros_like(start))
        return Intervals.of_known(width, begin % self.length, self.length)

    def trailing(self, num_components: int, device: torch.device | None = None) -> Intervals:
        """Component k on the indices k .. length, with its start moved down to the grid (width 0 past the end)."""
        index = torch.arange(num_components, dtype=torch.int64, device=device) // self.tile
        return self.intervals((self.cells - index).clamp(min=0), index.clamp(max=self.cells - 1))


@dataclass(frozen=True, eq=False)
class Problem:
    """One unsplit matrix to decompose.

    Args:
        weight: (m, n) float64 target.
        allowed: Multiply-adds that the result may cost.
        rows: Grid of the m rows.
        cols: Grid of the n columns.
        max_components: Largest number of components.
        metric: Norm in which the error is measured.
        seed: Seed of whatever is drawn at random.
        trains: Whether the factors will be trained. A low-rank part then stays one, for its gauge to be free: windows
            come closer, but their factors are far from orthogonal.
    """

    weight: Tensor
    allowed: int
    rows: Grid
    cols: Grid
    max_components: int
    metric: Metric
    seed: int
    trains: bool = False

    @cached_property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the weight, whitened on both sides: (m, r), (r,), (r, n)."""
        return singular_triplets(self.metric.whiten_rows(self.metric.whiten(self.weight)))

    def trapezoid_cost(self) -> Tensor:
        """(r_max + 1,) int64 multiply-adds of trapezoids of rank 0 .. r_max (MATH: r (m + n) - r (r - 1) unaligned)."""
        rank = min(self.rows.length, self.cols.length, self.max_components)
        each = multiply_adds(self.rows.trailing(rank).width, self.cols.trailing(rank).width)
        return torch.cat([each.new_zeros(1), each.cumsum(0)])

    def error(self, matrix: StructuredMatrix) -> float:
        """Relative error of a solution in the metric of the problem."""
        return self.metric.relative_error(self.weight, matrix.to_dense())
