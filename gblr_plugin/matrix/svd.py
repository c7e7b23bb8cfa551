"""Singular value decompositions: thin and truncated, also in a metric, where they give the best low-rank matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .metric import Metric

__all__ = ["balanced", "singular_triplets", "truncated_svd"]

GRAM_FROM = 1024
"""Smaller side from which the eigenvectors of the Gram matrix replace the SVD (several times faster, 1e-8 accurate)."""

Triplets = tuple[Tensor, Tensor, Tensor]


def singular_triplets(matrix: Tensor) -> Triplets:
    """Thin SVD of a float64 matrix, by its Gram matrix where that is large.

    Args:
        matrix: (m, n); r = min(m, n).

    Returns:
        (m, r) left vectors, (r,) singular values in falling order, (r, n) right vectors. For a large matrix, left
        vectors of singular values below 1e-8 of the first are not orthonormal.
    """
    m, n = matrix.shape
    if min(m, n) < GRAM_FROM:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    if m < n:
        left, values, right = singular_triplets(matrix.T)
        return right.T, values, left.T
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors.flip(1).T
    values = squares.flip(0).clamp(min=0).sqrt()
    image = matrix @ right.T
    return image / values.clamp(min=torch.finfo(image.dtype).tiny), values, right


def balanced(triplets: Triplets, rank: int) -> tuple[Tensor, Tensor]:
    """The leading triplets as two factors of equal norms, U sqrt(S) and sqrt(S) V^T.

    Args:
        triplets: (..., m, r) left vectors, (..., r) values, (..., r, n) right vectors.
        rank: Number of triplets, at most r.

    Returns:
        (..., m, rank) and (..., rank, n).
    """
    left, values, right = triplets
    scale = values[..., :rank].clamp(min=0).sqrt()
    return left[..., :rank] * scale[..., None, :], right[..., :rank, :] * scale[..., None]


def truncated_svd(
    weight: Tensor, rank: int, metric: Metric | None = None, triplets: Triplets | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of the best matrix of a rank in a metric (Eckart-Young-Mirsky, of the whitened weight).

    Args:
        weight: (m, n) float64.
        rank: At most min(m, n).
        metric: Norm of the error; default Frobenius.
        triplets: :func:`singular_triplets` of the whitened weight, where they are known.

    Returns:
        A (m, rank) and C (rank, n), balanced in norm once whitened.
    """
    metric = metric or Metric()
    if triplets is None:
        triplets = singular_triplets(metric.whiten_rows(metric.whiten(weight)))
    left, right = balanced(triplets, rank)
    return metric.unwhiten_rows(left), metric.unwhiten(right)
