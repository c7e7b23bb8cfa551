"""Truncated SVD: the best low-rank matrix, every component on all rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structure import StructuredMatrix
from .problem import Problem

__all__ = ["leading_triplets", "low_rank_factors", "svd"]

GRAM_FROM = 1024
"""Smaller side from which the eigenvectors of the Gram matrix replace the SVD (several times faster, 1e-8 accurate)."""


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a float64 matrix.

    Args:
        matrix: (m, n).
        rank: Number of triplets r, at most min(m, n).

    Returns:
        (m, r) left vectors, (r,) singular values in falling order, (r, n) right vectors.
    """
    m, n = matrix.shape
    if min(m, n) < GRAM_FROM:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    if m < n:
        left, values, right = leading_triplets(matrix.T, rank)
        return right.T, values, left.T
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors.flip(1)[:, :rank].T
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    image = matrix @ right.T
    return image / values.clamp(min=torch.finfo(image.dtype).tiny), values, right


def low_rank_factors(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors in the metric of the problem: A (m, r) with orthogonal columns, and C (r, n)."""
    left, values, right = leading_triplets(problem.metric.whiten(problem.weight), rank)
    scale = values.clamp(min=0).sqrt()
    return left * scale, problem.metric.unwhiten(right * scale[:, None])


def svd(problem: Problem) -> StructuredMatrix:
    """U sqrt(S) and sqrt(S) V^T of the largest rank that the budget pays, all widths full.

    Without a budget (``allowed`` at least r (m + n)) this is the published starting point of learning: K =
    max_components full-width components, whose cost may exceed the dense matrix's.
    """
    m, n = problem.weight.shape
    rank = min(problem.allowed // (m + n), problem.max_components, m, n)
    left, right = low_rank_factors(problem, rank)
    return StructuredMatrix.from_factors(left.T.contiguous(), right.contiguous())
