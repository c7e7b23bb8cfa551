"""Random factors, with which every other starting point is compared."""

from __future__ import annotations

import torch

from ..matrix.structure import StructuredMatrix
from .problem import Problem

__all__ = ["random"]


def random(problem: Problem) -> StructuredMatrix:
    """Gaussian factors on full widths, as many as the budget allows, of a product as large as the weight on average."""
    m, n = problem.weight.shape
    rank = min(problem.max_multiply_adds // (m + n), problem.max_components)
    generator = torch.Generator().manual_seed(problem.seed)
    spread = float(problem.weight.square().mean() / max(rank, 1)) ** 0.25
    u = torch.randn(rank, m, generator=generator, dtype=torch.float64) * spread
    v = torch.randn(rank, n, generator=generator, dtype=torch.float64) * spread
    return StructuredMatrix.from_factors(u.to(problem.weight.device), v.to(problem.weight.device))
