"""`decompose`: the best structured approximation of a dense matrix within a budget of multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.metric import DAMPING, Metric
from ..matrix.structure import StructuredMatrix
from ..matrix.svd import truncated_svd
from ..matrix.tiles import TiledAxis
from ..utils.validation import check_choice, check_count, check_row_splits, check_share, check_tile, check_weight
from .exact import exact
from .problem import Problem
from .pursuit import pursuit
from .random import random
from .svd import svd
from .trapezoid import least_error, trapezoid

__all__ = ["METHODS", "decompose", "initialise"]


_ROUNDING = 1e-7  # relative error of a matrix that is written exactly; single precision rounds by as much


def _best(problem: Problem) -> StructuredMatrix:
    """Interval pursuit, or trapezoids where they are better in the metric of the problem."""
    found = _pursuit(problem)
    # A matrix that is a sum of blocks is found exactly; trapezoids might be nearer by rounding, but cost far more.
    if problem.error(found) <= max(least_error(problem), _ROUNDING):
        return found
    return min((trapezoid(problem), found), key=problem.error)


def _pursuit(problem: Problem) -> StructuredMatrix:
    """Pursuit in the metric of the inputs alone, since blocks cannot use moments of loss gradients."""
    plain = problem.metric.gradient is None  # the same problem object then, which keeps its singular triplets
    return pursuit(problem if plain else replace(problem, metric=problem.metric.of_inputs()))


METHODS: dict[str, Callable[[Problem], StructuredMatrix]] = {
    "gblr": _best,
    "pursuit": _pursuit,
    "svd": svd,
    "trapezoid": trapezoid,
    "random": random,
}
"""Decomposition methods by name."""


def _something(problem: Problem, found: StructuredMatrix) -> StructuredMatrix:
    """``found``, or if it is empty because the budget is below rank 1, the tile that holds the largest entry."""
    if found.num_components or not bool(problem.weight.any()):
        return found
    cells = torch.tensor([[1], [1]])
    largest = int(problem.weight.abs().argmax())
    places = divmod(largest, problem.weight.shape[1])
    rows, cols = (
        grid.intervals(count, torch.tensor([place // grid.tile]))
        for grid, count, place in zip((problem.rows, problem.cols), cells, places, strict=True)
    )
    inside = rows.support().T.to(problem.weight) * problem.weight * cols.support().to(problem.weight)
    left, right = truncated_svd(inside, 1)
    return StructuredMatrix.from_factors(left.T, right, rows, cols)


def _solve(
    weight: Tensor,
    method: str,
    *,
    budget: float | None,
    calibration: Tensor | Metric | None,
    damping: float,
    align: int | tuple[int, int],
    max_components: int | None,
    row_splits: int,
    seed: int,
    trains: bool = False,
) -> StructuredMatrix:
    """Check the arguments, solve each split on its own, and stack the results in the dtype of the weight."""
    check_weight("decompose: weight", weight)
    check_row_splits("decompose: row_splits", row_splits, len(weight))
    if budget is not None:
        check_share("decompose: budget", budget)
    check_choice("decompose: method", method, METHODS)
    tiles = check_tile("decompose: align", align)
    if max_components is not None:
        check_count("decompose: max_components", max_components)
    metric = Metric.from_calibration("decompose", calibration, weight, damping)
    # Entries of about 1, by a power of 4, which rounds nothing: sums of squares have their range too.
    target = weight.detach().double()
    size = float(target.abs().max()) if weight.numel() else 0.0
    root = 2.0 ** (math.frexp(size)[1] // 2)
    splits = (target / root / root).chunk(row_splits)
    m, n = splits[0].shape
    limit = min(m, n) if max_components is None else max_components
    max_multiply_adds = limit * (m + n) if budget is None else math.floor(budget * m * n + 1e-6)
    rows, cols = TiledAxis(m, tiles[0]), TiledAxis(n, tiles[1])
    cheapest = int(rows.widths(torch.tensor(1)) + cols.widths(torch.tensor(1)))
    if max_multiply_adds < cheapest:
        raise ConfigError(
            f"decompose: a budget of {budget} of a {m} x {n} matrix allows {max_multiply_adds} multiply-adds, "
            f"fewer than the {cheapest} of its smallest block; raise the budget or leave this matrix dense"
        )
    # A budget of 1 allows the matrix itself, written exactly.
    allows_all = method in ("gblr", "pursuit", "trapezoid") and budget == 1 and limit >= min(m, n)
    solve = exact if allows_all else METHODS[method]
    problems = [
        Problem(
            split,
            max_multiply_adds,
            rows,
            cols,
            limit,
            metric.for_rows(index * m, (index + 1) * m),
            seed + index,
            trains,
        )
        for index, split in enumerate(splits)
    ]
    solved = [_something(problem, solve(problem).live()) for problem in problems]
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    stacked = StructuredMatrix.cat(solved, 0)
    return replace(stacked, u=(stacked.u * root).to(dtype), v=(stacked.v * root).to(dtype))


@torch.no_grad()
def decompose(
    weight: Tensor,
    budget: float,
    *,
    method: str = "gblr",
    calibration: Tensor | Metric | None = None,
    align: int | tuple[int, int] = 1,
    max_components: int | None = None,
    row_splits: int = 1,
    seed: int = 0,
    damping: float = DAMPING,
) -> StructuredMatrix:
    """Approximate a dense matrix by a GBLR matrix within a budget.

    Args:
        weight: (m, n) floating point, finite.
        budget: Allowed multiply-adds of a matrix-vector product over those of the dense matrix, m * n; in (0, 1].
        method: ``"gblr"`` (the best: `pursuit`, or `trapezoid` where that is better), ``"pursuit"``, ``"trapezoid"``,
            ``"svd"`` or ``"random"``.
        calibration: (N, n) input activations or their (n, n) second moment. The error minimised is then that of the
            output ``W x`` over these inputs, otherwise ``||W - W_hat||_F``. A square symmetric tensor is taken for a
            moment; a :class:`~gblr_plugin.matrix.metric.Metric` is used as it is.
        align: Intervals begin and end at multiples of this many rows and columns; an int or a pair (rows, cols).
        max_components: Largest number K of components of each split; default ``min(m / row_splits, n)``.
        row_splits: Number of matrices stacked in the rows of the weight (packed q, k, v: 3), each given its share of
            the budget.
        seed: Seed of random draws; the result is deterministic for a seed.
        damping: Added to the diagonal of the second moment, as a fraction of its mean.

    Returns:
        A matrix with ``relative_flops <= budget`` in the dtype of the weight (float32 for half precision), without
        components that cost nothing. At ``budget = 1`` it is the weight to rounding: one component a row or column,
        which a dense product computes for m * n multiply-adds.

    Raises:
        ConfigError: If an argument is out of the ranges above, or the budget is below the cost of the smallest block.
    """
    if budget is None:
        raise ConfigError("decompose: budget must be a number in (0, 1], got None")
    return _solve(
        weight,
        method,
        budget=budget,
        calibration=calibration,
        damping=damping,
        align=align,
        max_components=max_components,
        row_splits=row_splits,
        seed=seed,
    )


@torch.no_grad()
def initialise(
    weight: Tensor,
    method: str = "svd",
    *,
    num_components: int | None = None,
    row_splits: int = 1,
    budget: float | None = None,
    align: int | tuple[int, int] = 1,
    seed: int = 0,
    calibration: Tensor | Metric | None = None,
) -> StructuredMatrix:
    """Starting point of a trainable layer: as :func:`decompose`, with a low-rank part in trapezoid form.

    The components of :func:`decompose`'s low-rank part may be zero on windows, for a smaller error. Here the low-rank
    part keeps the trapezoid form, which a layer can train in low-rank form
    (:meth:`gblr_plugin.layers.GBLRLayer.use_low_rank_form`).

    Args:
        weight: (m, n) dense weight.
        method: As in :func:`decompose`. ``"svd"``, ``"trapezoid"`` and ``"random"`` need no budget: without one they
            give ``num_components`` components, which may cost more than the dense matrix (as the paper's start does).
        num_components: Largest number K of components of each split; default ``min(m / row_splits, n)``.
        row_splits: Number of matrices stacked in the rows.
        budget: Relative FLOPs in (0, 1], or ``None``.
        align: As in :func:`decompose`.
        seed: Seed of random draws.
        calibration: As in :func:`decompose`.

    Returns:
        A matrix of at most ``num_components`` components a split.

    Raises:
        ConfigError: As :func:`decompose`; also where a method that needs a budget is given none.
    """
    if budget is None and method in METHODS and method not in ("svd", "trapezoid", "random"):
        raise ConfigError(f"initialise: method {method!r} needs a budget; svd, trapezoid and random can do without")
    return _solve(
        weight,
        method,
        budget=budget,
        calibration=calibration,
        damping=DAMPING,
        align=align,
        max_components=num_components,
        row_splits=row_splits,
        seed=seed,
        trains=True,
    )
