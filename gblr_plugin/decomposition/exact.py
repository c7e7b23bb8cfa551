"""The matrix itself, for a budget that pays for it."""

from __future__ import annotations

import torch

from ..structure import StructuredMatrix
from .problem import Problem

__all__ = ["exact"]


def exact(problem: Problem) -> StructuredMatrix:
    """The matrix itself: a component per row (or column, if fewer), narrow on one side and full on the other."""
    m, n = problem.weight.shape
    by_rows = m <= n
    grid = problem.rows if by_rows else problem.cols
    count = min(m, n)
    unit = torch.eye(count, dtype=problem.weight.dtype, device=problem.weight.device)
    index = torch.arange(count, dtype=torch.int64, device=unit.device) // grid.tile
    narrow = grid.intervals(torch.ones_like(index), index)
    if by_rows:
        return StructuredMatrix.from_factors(unit, problem.weight.clone(), rows=narrow)
    return StructuredMatrix.from_factors(problem.weight.T.contiguous(), unit, cols=narrow)
