"""Truncated SVD: the best low-rank matrix, every component on all rows and columns."""

from __future__ import annotations

from ..matrix.structure import StructuredMatrix
from .problem import Problem

__all__ = ["svd"]


def svd(problem: Problem) -> StructuredMatrix:
    """U sqrt(S) and sqrt(S) V^T of the largest rank within the budget, all widths full.

    Without a budget (``max_multiply_adds`` at least r (m + n)) this is the published starting point of learning: K =
    max_components full-width components, whose cost may exceed the dense matrix's.
    """
    m, n = problem.weight.shape
    rank = min(problem.max_multiply_adds // (m + n), problem.max_components, m, n)
    left, right = problem.low_rank(rank)
    return StructuredMatrix.from_factors(left.T.contiguous(), right.contiguous())
