"""Singular triplets, the starting point of every low-rank part."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["singular_triplets"]

GRAM_FROM = 1024
"""Smaller side from which the eigenvectors of the Gram matrix replace the SVD (several times faster, 1e-8 accurate)."""


def singular_triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
