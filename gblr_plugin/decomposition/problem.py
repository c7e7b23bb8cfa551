"""The input of every decomposition method: a matrix, its budget, its metric, and where intervals may begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix, multiply_adds
from ..matrix.svd import singular_triplets, truncated_svd
from ..matrix.tiles import TiledAxis

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """One unsplit matrix to decompose.

    Args:
        weight: (m, n) float64 target.
        max_multiply_adds: Multiply-adds that the result may cost.
        rows: The axis of the m rows, with its tile.
        cols: The axis of the n columns, with its tile.
        max_components: Largest number of components.
        metric: Norm in which the error is measured.
        seed: Seed of whatever is drawn at random.
        trains: Whether the factors will be trained. The low-rank part then keeps the trapezoid form, which layers train
            in low-rank form. Windows have a smaller error, but their factors are far from orthogonal and train badly.
    """

    weight: Tensor
    max_multiply_adds: int
    rows: TiledAxis
    cols: TiledAxis
    max_components: int
    metric: Metric
    seed: int
    trains: bool = False

    @cached_property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the weight, whitened on both sides: (m, r), (r,), (r, n)."""
        return singular_triplets(self.metric.whiten_rows(self.metric.whiten(self.weight)))

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors A (m, rank) and C (rank, n) of the best matrix of that rank in the problem's metric."""
        return truncated_svd(self.weight, rank, self.metric, self.triplets)

    def trapezoid_cost(self) -> Tensor:
        """(r_max + 1,) int64 multiply-adds of trapezoids of rank 0 .. r_max (MATH: r (m + n) - r (r - 1) unaligned)."""
        rank = min(self.rows.length, self.cols.length, self.max_components)
        each = multiply_adds(self.rows.trailing(rank).width, self.cols.trailing(rank).width)
        return torch.cat([each.new_zeros(1), each.cumsum(0)])

    def error(self, matrix: StructuredMatrix) -> float:
        """Relative error of a solution in the metric of the problem."""
        return self.metric.relative_error(self.weight, matrix.to_dense())
