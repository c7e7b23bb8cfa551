"""The best low-rank matrix in trapezoid form; see :mod:`gblr_plugin.matrix.trapezoid_form`."""

from __future__ import annotations

from ..matrix.structure import StructuredMatrix
from ..matrix.trapezoid_form import trapezoid_form
from .problem import Problem

__all__ = ["least_error", "trapezoid"]


def _rank(problem: Problem) -> int:
    return int((problem.trapezoid_cost() <= problem.max_multiply_adds).sum()) - 1


def least_error(problem: Problem) -> float:
    """Lower bound of the relative error of :func:`trapezoid`, which equals it if a stable trapezoid form exists."""
    energy = problem.triplets[1].square()
    return float((energy[_rank(problem) :].sum() / energy.sum().clamp(min=1e-300)).sqrt())


def trapezoid(problem: Problem) -> StructuredMatrix:
    """The best low-rank matrix in trapezoid form within the budget; at least as close as the SVD of equal cost."""
    m, n = problem.weight.shape
    rank = _rank(problem)
    left, right = problem.low_rank(rank)
    if rank == 0:
        return StructuredMatrix.from_factors(left.T.contiguous(), right.contiguous())
    found = trapezoid_form(left, right, problem.rows, problem.cols)
    if found is not None:
        return found
    rank = min(rank, problem.max_multiply_adds // (m + n))
    return StructuredMatrix.from_factors(left[:, :rank].T.contiguous(), right[:rank].contiguous())
