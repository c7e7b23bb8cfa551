r"""Writes a rank-r product as r components that are each zero on a window of one axis, which saves multiply-adds.

An r-dimensional space has a vector that is zero on any given r - 1 indices (the trapezoid form uses this), and one that
is nearly zero on many more: on z > r indices, the smallest singular value of the z x r block of a basis grows only like
sqrt(z) - sqrt(r). So r windows are spread evenly over the axis, and each component takes the vector that is smallest on
its window. All windows have one length, the best of a few that are tried: the multiply-adds saved, times the least gain
per multiply-add, exceed the squared error by most. The squared error is that after the other components are refitted:
index i loses the projection of its row on the directions whose windows hold i. With tiles, the trapezoid form wastes up
to one tile per component, while windows are complete tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix.tiles import TiledAxis
from .joint import supported_solve
from .problem import Problem
from .spans import Spans
from .state import State, norms, orthonormal

__all__ = ["Windows", "best_windows", "with_windows"]

LENGTHS = (1.5, 2.0, 3.0, 1.0)
"""Lengths of the windows that are compared, over the rank, in this order."""
ITERATIONS = 4
"""Steps of the inverse iteration that finds the smallest directions."""
RIDGE = 1e-10
CHUNK_ENTRIES = 1 << 24
"""Largest number of entries gathered at once."""


@dataclass(frozen=True, eq=False)
class Windows:
    """r components of one factor, each zero on a window.

    Args:
        factor: (r, N) factors, zero outside ``spans``.
        spans: Intervals of the components: the complements of their windows.
        net: Multiply-adds saved times the least gain per multiply-add, less the squared error.
    """

    factor: Tensor
    spans: Spans
    net: float


def _window_starts(grid: TiledAxis, rank: int) -> tuple[Tensor, Tensor]:
    """(rank,) int64: first cell of each window, evenly spread; and how many windows before it begin at that cell."""
    index = torch.arange(rank)
    start = index * grid.cells // rank
    return start, index - torch.searchsorted(start, start)


def _directions(factor: Tensor, zero: Tensor, turn: Tensor) -> Tensor:
    """(r, r) unit columns: for each window, the direction that is ``turn``-th smallest on it, counted from 0.

    Args:
        factor: (N, r).
        zero: (r, z) indices of the windows.
        turn: (r,) number of the direction to take; windows that are equal take different directions.
    """
    rank = factor.shape[1]
    eye = torch.eye(rank, dtype=factor.dtype, device=factor.device)
    block = int(turn.max()) + 1
    start = torch.randn(rank, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor)
    columns = []
    step = max(1, CHUNK_ENTRIES // (rank * max(rank, zero.shape[1])))
    for chunk, turns in zip(zero.split(step), turn.split(step), strict=True):
        rows = factor[chunk]
        gram = rows.transpose(1, 2) @ rows
        level = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        root, _ = torch.linalg.cholesky_ex(gram + level[:, None, None] * eye)
        found = start.expand(len(chunk), -1, -1)
        for _ in range(ITERATIONS):
            found = torch.linalg.qr(torch.cholesky_solve(found, root))[0]
        columns.append(found[torch.arange(len(chunk), device=turns.device), :, turns])
    return torch.cat(columns).T


def _lost(factor: Tensor, directions: Tensor, left_out: Tensor) -> float:
    """Squared error after components leave entries out and the remaining entries are refitted.

    Args:
        factor: (N, r) in an orthonormal basis of the other side.
        directions: (r, r) unit columns.
        left_out: (r, N) bool, whether a component leaves out an index.
    """
    share = directions.T @ factor.T
    fitted, _ = supported_solve(directions.T @ directions, share, left_out)
    return float((fitted * share).sum())


def best_windows(factor: Tensor, grid: TiledAxis, min_gain: float, least: float = 0.0) -> Windows | None:
    """The windows that save most, among several lengths.

    Args:
        factor: (N, r) float64 factor of a product whose other factor has orthonormal rows.
        grid: The axis of length N, which must be cyclic: a window in the middle leaves an interval that wraps.
        min_gain: Squared error that one multiply-add must save.
        least: Windows are returned only if their ``net`` is above this value.

    Returns:
        The windows, or ``None`` where the axis is too short for them or not cyclic, or nothing is saved.
    """
    length, rank = factor.shape
    if not grid.cyclic or rank < 2:
        return None
    start, turn = (each.to(factor.device) for each in _window_starts(grid, rank))
    best: Windows | None = None
    longest, top = grid.cells // 2, -math.inf
    for cells in dict.fromkeys(max(1, round(times * rank / grid.tile)) for times in LENGTHS):
        width = cells * grid.tile
        if cells > longest or min_gain * width * rank <= least:
            continue
        zero = (start[:, None] * grid.tile + torch.arange(width, device=factor.device)) % length
        directions = _directions(factor, zero, turn)
        spans = Spans(torch.full_like(start, grid.cells - cells), (start + cells) % grid.cells, grid)
        support = spans.support()
        if not bool(torch.isfinite(directions).all()):
            continue
        net = min_gain * width * rank - _lost(factor, directions, ~support)
        if net <= top:
            longest = cells  # longer ones lose more still
        top = max(top, net)
        if net > least:
            best, least = Windows((factor @ directions).T * support, spans, net), net
    return best


def with_windows(state: State, problem: Problem, min_gain: float) -> State | None:
    """Replace the low-rank part by components that are zero on windows; ``None`` if the trapezoid form saves more.

    Args:
        state: Blocks and a low-rank part.
        problem: The matrix; its metric must be the Frobenius norm.
        min_gain: Squared error that one multiply-add must save.

    Returns:
        A state without low-rank part, in float64, since these factors are far from orthogonal. Its first components,
        of infinite net gain, are those of the low-rank part.
    """
    rank, grids = state.left.shape[1], (problem.rows, problem.cols)
    state = state.to(torch.float64)
    rest = problem.weight - state.u.T @ state.v
    left = orthonormal(rest @ state.right.T)
    right, corner = torch.linalg.qr(rest.T @ left)  # the residual of the blocks is left corner^T right^T
    saved = rank * sum(problem.weight.shape) - int(problem.trapezoid_cost()[rank])
    factors = left @ corner.T, right @ corner
    axis, windows = 0, best_windows(factors[0], grids[0], min_gain, min_gain * saved)
    least = min_gain * saved if windows is None else windows.net
    better = best_windows(factors[1], grids[1], min_gain, least)
    if better is not None:
        axis, windows = 1, better
    if windows is None:
        return None
    # Fit the other factor, on its complete axis, to the low-rank part.
    fit = torch.linalg.pinv(windows.factor.T) @ factors[axis]
    other = grids[1 - axis]
    zeros = torch.zeros(rank, dtype=torch.int64, device=fit.device)
    full = Spans(zeros + other.cells, zeros, other)
    if axis == 0:
        u, v, rows, cols = windows.factor, fit @ right.T, windows.spans, full
    else:
        u, v, rows, cols = fit @ left.T, windows.factor, full, windows.spans
    size = norms(u)
    v = v * size
    return State(
        torch.cat([u / size, state.u]),
        torch.cat([v, state.v]),
        rows.join(state.rows),
        cols.join(state.cols),
        u.new_zeros(u.shape[1], 0),
        v.new_zeros(0, v.shape[1]),
        torch.cat([v, state.v]),
        torch.cat([v.new_full((rank,), math.inf), state.net_gain]),
    )
