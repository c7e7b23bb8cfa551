"""Truncated SVD: the best low-rank matrix, every component on all rows and columns."""

from __future__ import annotations

from torch import Tensor

from ..matrix.structure import StructuredMatrix
from .problem import Problem

__all__ = ["low_rank_factors", "svd"]


def low_rank_factors(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors in the metric of the problem: A (m, r), orthogonal columns once whitened, C (r, n)."""
    left, values, right = (problem.triplets[0][:, :rank], problem.triplets[1][:rank], problem.triplets[2][:rank])
    scale = values.clamp(min=0).sqrt()
    return problem.metric.unwhiten_rows(left * scale), problem.metric.unwhiten(right * scale[:, None])


def svd(problem: Problem) -> StructuredMatrix:
    """U sqrt(S) and sqrt(S) V^T of the largest rank that the budget pays, all widths full.

    Without a budget (``allowed`` at least r (m + n)) this is the published starting point of learning: K =
    max_components full-width components, whose cost may exceed the dense matrix's.
    """
    m, n = problem.weight.shape
    rank = min(problem.allowed // (m + n), problem.max_components, m, n)
    left, right = low_rank_factors(problem, rank)
    return StructuredMatrix.from_factors(left.T.contiguous(), right.contiguous())
