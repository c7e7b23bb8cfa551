"""Low-rank matrices: the truncated SVD, with a rank from the budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..matrix.svd import truncated_svd
from .base import FamilyMatrix
from .checks import too_small

__all__ = ["LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank(FamilyMatrix):
    """``W = A B`` with A of r columns: r (m + n) multiply-adds.

    The SVD gives the best member in every unitarily invariant norm (Eckart-Young-Mirsky). As a GBLR matrix: r
    components of full widths.

    Args:
        left: (m, r) A.
        right: (r, n) B.
    """

    name = "low_rank"
    left: Tensor
    right: Tensor

    @classmethod
    def _project(cls, weight: Tensor, max_multiply_adds: int, *, metric: Metric) -> LowRank:
        m, n = weight.shape
        rank = min(max_multiply_adds // (m + n), m, n)
        if rank < 1:
            raise too_small(cls.name, weight.shape, max_multiply_adds, m + n, "rank 1")
        return cls(*truncated_svd(weight, rank, metric))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[0], self.right.shape[1]

    def to_dense(self) -> Tensor:
        """A B."""
        return self.left @ self.right

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two products through r intermediate values."""
        return F.linear(F.linear(x, self.right), self.left, bias)

    def to_structured(self) -> StructuredMatrix:
        """The r components of full widths, at equal cost."""
        return StructuredMatrix.from_factors(self.left.T.contiguous(), self.right)
