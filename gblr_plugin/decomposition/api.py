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
from ..matrix.tiles import TiledAxis
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
    # Blocks that are there are found at their cost; trapezoids may be nearer by rounding alone, and cost far more.
    if problem.error(found) <= max(least_error(problem), _ROUNDING):
        return found
    return min((trapezoid(problem), found), key=problem.error)


def _pursuit(problem: Problem) -> StructuredMatrix:
    """Local blocks are chosen by their gains over inputs alone."""
    plain = problem.metric.gradient is None  # the same problem then, whose singular triplets are at hand
    return pursuit(problem if plain else replace(problem, metric=problem.metric.of_inputs()))


METHODS: dict[str, Callable[[Problem], StructuredMatrix]] = {
    "gblr": _best,
    "pursuit": _pursuit,
    "svd": svd,
    "trapezoid": trapezoid,
    "random": random,
}
"""Decomposition methods by name."""


def _check_weight(weight: Tensor, row_splits: int) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        what = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"decompose: weight must be a 2-d floating-point tensor (m, n), got {what}")
    if weight.dtype.itemsize < 2:
        raise ConfigError(f"decompose: weight must have half precision or more, got {weight.dtype}")
    if min(weight.shape) < 1:
        raise ConfigError(f"decompose: weight must have rows and columns, got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ConfigError("decompose: weight is on the meta device, it has no values to approximate")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("decompose: weight holds NaN or infinite values")
    if not isinstance(row_splits, int) or row_splits < 1 or weight.shape[0] % row_splits:
        raise ConfigError(
            f"decompose: row_splits must be a positive divisor of the {weight.shape[0]} rows, got {row_splits!r}"
        )


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ConfigError(f"decompose: budget must be a number in (0, 1], got {budget!r}")


def _check_tiles(align: int | tuple[int, int]) -> tuple[int, int]:
    rows, cols = align if isinstance(align, (tuple, list)) and len(align) == 2 else (align, align)
    for tile in (rows, cols):
        if not isinstance(tile, int) or tile < 1:
            raise ConfigError(f"decompose: align must be a positive int or a pair (rows, cols) of them, got {align!r}")
    return rows, cols


def _metric(calibration: Tensor | Metric | None, weight: Tensor, damping: float) -> Metric:
    n = weight.shape[1]
    if calibration is None:
        return Metric()
    if isinstance(calibration, Metric):
        return calibration
    if (
        not isinstance(calibration, Tensor)
        or calibration.dim() != 2
        or calibration.shape[1] != n
        or not len(calibration)
    ):
        what = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
        raise ConfigError(
            f"decompose: calibration must be (N, {n}) activations or an ({n}, {n}) second moment, got {what}"
        )
    if not bool(torch.isfinite(calibration).all()):
        raise ConfigError("decompose: calibration holds NaN or infinite values")
    data = calibration.detach().to(device=weight.device, dtype=torch.float64)
    if data.shape == (n, n) and torch.allclose(data, data.T, rtol=1e-4, atol=1e-6 * float(data.abs().max())):
        return Metric.from_moment(data, damping)
    return Metric.from_moment(data.T @ data / len(data), damping)


def _something(problem: Problem, found: StructuredMatrix) -> StructuredMatrix:
    """The solution, or where a budget below rank 1 left nothing, the tile around the largest entry."""
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
    left, values, right = torch.linalg.svd(inside, full_matrices=False)
    size = values[0].sqrt()
    return StructuredMatrix.from_factors((left[:, :1] * size).T, right[:1] * size, rows, cols)


def _solve(
    weight: Tensor,
    method: str,
    *,
    budget: float | None,
    metric: Metric,
    tiles: tuple[int, int],
    max_components: int | None,
    row_splits: int,
    seed: int,
    trains: bool = False,
) -> StructuredMatrix:
    """Solve each split on its own and stack the results in the dtype of the weight."""
    if method not in METHODS:
        raise ConfigError(f"decompose: method must be one of {', '.join(METHODS)}, got {method!r}")
    if max_components is not None and (not isinstance(max_components, int) or max_components < 1):
        raise ConfigError(f"decompose: max_components must be a positive int, got {max_components!r}")
    # Entries of about 1, by a power of 4, which rounds nothing: sums of squares have their range too.
    target = weight.detach().double()
    size = float(target.abs().max()) if weight.numel() else 0.0
    root = 2.0 ** (math.frexp(size)[1] // 2)
    parts = (target / root / root).chunk(row_splits)
    m, n = parts[0].shape
    limit = min(m, n) if max_components is None else max_components
    allowed = limit * (m + n) if budget is None else math.floor(budget * m * n + 1e-6)
    rows, cols = TiledAxis(m, tiles[0]), TiledAxis(n, tiles[1])
    cheapest = int(rows.widths(torch.tensor(1)) + cols.widths(torch.tensor(1)))
    if allowed < cheapest:
        raise ConfigError(
            f"decompose: a budget of {budget} of a {m} x {n} matrix allows {allowed} multiply-adds, "
            f"fewer than the {cheapest} of its smallest block; raise the budget or leave this matrix dense"
        )
    # Dense is always at hand at its own price, and then exact.
    whole = method in ("gblr", "pursuit", "trapezoid") and budget == 1 and limit >= min(m, n)
    solve = exact if whole else METHODS[method]
    problems = [
        Problem(part, allowed, rows, cols, limit, metric.for_rows(index * m, (index + 1) * m), seed + index, trains)
        for index, part in enumerate(parts)
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
        ConfigError: If an argument is out of the ranges above, or the budget does not pay for a single block.
    """
    _check_weight(weight, row_splits)
    _check_budget(budget)
    return _solve(
        weight,
        method,
        budget=float(budget),
        metric=_metric(calibration, weight, damping),
        tiles=_check_tiles(align),
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
    """Starting point of a trainable layer: as :func:`decompose`, with a low-rank part that stays one.

    :func:`decompose` may give its components windows that they leave out, which comes closer to the weight; here it
    keeps a gauge that can be freed (:meth:`gblr_plugin.layers.GBLRLayer.free_gauge`).

    Args:
        weight: (m, n) dense weight.
        method: As in :func:`decompose`. ``"svd"``, ``"trapezoid"`` and ``"random"`` can do without a budget: they then
            give ``num_components`` components, which may cost more than the dense matrix (as the published start does).
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
    if budget is not None:
        _check_budget(budget)
    elif method in METHODS and method not in ("svd", "trapezoid", "random"):
        raise ConfigError(f"initialise: method {method!r} needs a budget; svd, trapezoid and random can do without")
    _check_weight(weight, row_splits)
    return _solve(
        weight,
        method,
        budget=None if budget is None else float(budget),
        metric=_metric(calibration, weight, DAMPING),
        tiles=_check_tiles(align),
        max_components=num_components,
        row_splits=row_splits,
        seed=seed,
        trains=True,
    )
