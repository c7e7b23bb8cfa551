r"""Cheapest exact form of a matrix of low rank: the basis of its row space on the shortest intervals.

A vector of the row space that lives on the interval [p, e] vanishes on the indices between, e + 1 .. p - 1. Walking
down the axis, keep the most recent indices whose rows (of an orthonormal basis of the space) are independent. Where
row e comes in it depends on rows kept, the oldest of which is p: the dual vector of p vanishes on every other row
kept, hence on e + 1 .. p - 1, and no shorter interval ends at e. Each e gives one candidate; the shortest independent
ones are a basis of least total width (a matroid: greedy is optimal). The factors of the other side follow, up to
adding to one those of the components whose interval contains its own; the same walk settles these. Sums of blocks on
intervals are recovered at their true cost, and low rank without structure comes out as trapezoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..structure import Intervals, StructuredMatrix
from .interval_finder import longest_run
from .joint import supported_solve
from .problem import Grid, Problem
from .spans import Spans
from .triplets import singular_triplets

__all__ = ["shortest", "shortest_vectors"]

EXACT = 1e-5
"""Largest relative error of what is called the matrix itself."""
SINGULAR = 1e-6
"""Singular values below this part of the first are rounding."""
LARGEST_WORK = 1 << 33
"""Multiply-adds of the walk beyond which it is not tried."""
SLACKS = (0, 1, 2, 4)
"""By how many indices an interval may be made longer for the sake of the other side."""


def shortest_vectors(rows: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each index, the shortest interval ending there that a vector of a column space lives on.

    Args:
        rows: (B, N, d) float64: B bases of d vectors along an axis of length N; columns may be zero (padding).
        tolerance: What is smaller, relative to a row of norm 1, is zero.

    Returns:
        Widths and starts, (B, N) int64 (width 0: no vector ends there), and coefficients (B, N, d): the vector is
        ``rows @ coefficients[:, e]``.
    """
    batch, length, dim = rows.shape
    sizes = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    present = sizes[:, :, 0] > tolerance * sizes.amax((1, 2))[:, None]
    unit = rows / sizes.clamp(min=torch.finfo(rows.dtype).tiny)
    basis = torch.eye(dim, dtype=rows.dtype, device=rows.device).repeat(batch, 1, 1)
    born = torch.full((batch, dim), -1, dtype=torch.int64, device=rows.device)
    width = torch.zeros(batch, length, dtype=torch.int64, device=rows.device)
    start = torch.zeros_like(width)
    coefficients = rows.new_zeros(batch, length, dim)
    each = torch.arange(batch, device=rows.device)
    for step in range(2 * length):  # a second lap, since the axis is a circle
        # Solved anew each time: updates of rank 1 lose all digits where the dependence on the oldest row is slight.
        inverse = torch.linalg.inv_ex(basis)[0]
        end = -step % length
        row = unit[:, end]
        share = (row[:, None] @ inverse)[:, 0]
        needed = (share.abs() > tolerance) & present[:, end, None]
        # Of the unit vectors that stand in at first, all of one age, the one with the largest share goes.
        age = born - share.abs() / (1 + share.abs().amax(1, keepdim=True))
        oldest = torch.where(needed, age, torch.full_like(age, 2 * length)).argmin(1)
        found = needed.any(1)
        dual = inverse[each, :, oldest]
        if step >= length:
            back = step - born[each, oldest]
            width[:, end] = torch.where(found, length + 1 - back, width[:, end])
            start[:, end] = (end + back) % length
            coefficients[:, end] = dual
        basis[each, oldest] = torch.where(found[:, None], row, basis[each, oldest])
        born[each, oldest] = torch.where(found, torch.full_like(oldest, step), born[each, oldest])
    return width, start, coefficients


def _independent(vectors: Tensor, count: int, tolerance: float) -> list[int]:
    """Positions of the first ``count`` rows of (N, d) that are independent of those before."""
    basis = vectors.new_zeros(0, vectors.shape[1])
    kept: list[int] = []
    for index, vector in enumerate(vectors):
        rest = vector / torch.linalg.vector_norm(vector)
        for _ in range(2):
            rest = rest - (basis @ rest) @ basis
        size = torch.linalg.vector_norm(rest)
        if float(size) > tolerance:
            basis = torch.cat([basis, (rest / size)[None]])
            kept.append(index)
            if len(kept) == count:
                break
    return kept


def _covering(width: Tensor, start: Tensor, grid: Grid) -> Spans:
    """Fewest cells that hold the given intervals of indices."""
    first = start // grid.tile
    cells = (start % grid.tile + width + grid.tile - 1) // grid.tile
    whole = (cells >= grid.cells) | ((start + width > grid.length) & (not grid.cyclic))
    return Spans(torch.where(whole, grid.cells, cells), torch.where(whole, 0, first), grid)


def _runs(vectors: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Width and start of the shortest cyclic interval that holds the entries of each row above the tolerance."""
    size = vectors.abs()
    gap, first = longest_run(size <= tolerance * size.amax(1, keepdim=True))
    return vectors.shape[1] - gap, (first + gap) % vectors.shape[1]


def _mixed(u: Tensor, v_support: Tensor, tolerance: float) -> Tensor | None:
    """(r, r) matrix by which row factors take up one another so that each is as short as can be.

    Factor l may take up factor k where the columns of k, made a little longer, hold those of l.
    """
    rank, length = u.shape
    contains = ~(v_support[0][:, None] & ~v_support[1][None]).any(2)
    members = contains.sum(1)
    most = int(members.max())
    if rank * length * most**2 > LARGEST_WORK >> 2:
        return None
    own_first = contains.to(torch.int64) + torch.eye(rank, dtype=torch.int64, device=u.device)
    table = torch.argsort(own_first, dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=u.device) < members[:, None]
    bases = (u[table] * valid[:, :, None]).transpose(1, 2)
    width, _, coefficients = shortest_vectors(bases, tolerance)
    parts = coefficients.abs() * torch.linalg.vector_norm(bases, dim=1)[:, None]
    holds = (width > 0) & (parts[:, :, 0] > tolerance * parts.amax(2))
    best = torch.where(holds, width, torch.full_like(width, length + 1)).argmin(1, keepdim=True)
    chosen = coefficients.gather(1, best[:, :, None].expand(-1, -1, most))[:, 0] * valid
    mix = torch.zeros(rank, rank, dtype=u.dtype, device=u.device).scatter_add_(1, table, chosen)
    found = holds.any(1, keepdim=True)
    return torch.where(found, mix, torch.eye(rank, dtype=u.dtype, device=u.device))


def _from_columns(
    target: Tensor, space: Tensor, tolerance: float, allowed: int, rows: Grid, cols: Grid
) -> list[StructuredMatrix]:
    """Columns on the shortest intervals, then rows; ``space`` (n, r) spans the rows of ``target`` (m, n)."""
    rank = space.shape[1]
    width, start, coefficients = (part[0] for part in shortest_vectors(space[None], tolerance))
    ends = (width > 0).nonzero()[:, 0]
    ends = ends[torch.argsort(width[ends], stable=True)]
    ends = ends[_independent(coefficients[ends], rank, tolerance)]
    if len(ends) < rank or int(width[ends].sum()) + rank > allowed:
        return []
    exact = Intervals(width[ends], start[ends], cols.length)
    v = (coefficients[ends] @ space.T) * exact.support()
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = torch.linalg.lstsq(v.T, target.T).solution
    found = []
    for slack in SLACKS:  # where blocks begin or end together, a basis that is shorter by an index mixes them
        wide = Intervals(
            (exact.width + 2 * slack).clamp(max=cols.length), (exact.start - slack) % cols.length, cols.length
        )
        mix = _mixed(u, torch.stack([exact.support(), wide.support()]), tolerance)
        if mix is None or not bool(torch.isfinite(mix).all()) or not float(torch.linalg.cond(mix)) < 1 / tolerance:
            continue
        # U' = mix U leaves the product alone when V' = mix^-T V.
        new_u, new_v = mix @ u, torch.linalg.solve(mix.T, v)
        new_v = new_v / torch.linalg.vector_norm(new_v, dim=1, keepdim=True)
        u_spans, v_spans = _covering(*_runs(new_u, tolerance), rows), _covering(*_runs(new_v, tolerance), cols)
        new_v = new_v * v_spans.support()
        new_u, _ = supported_solve(new_v @ new_v.T, new_v @ target.T, u_spans.support())
        size = torch.linalg.vector_norm(new_u, dim=1, keepdim=True).clamp(min=1e-300).sqrt()
        found.append(
            StructuredMatrix.from_factors(new_u / size, new_v * size, u_spans.intervals(), v_spans.intervals())
        )
    return found


def shortest(problem: Problem) -> StructuredMatrix | None:
    """The matrix itself on intervals of least total width, or ``None`` where its rank or cost is beyond the budget.

    Exact to the precision of the weight; meant for matrices whose rank is well below their size. The cheaper of
    starting from the columns and from the rows.
    """
    m, n = problem.weight.shape
    values = problem.triplets[1]
    if not float(values[0]) > 0 or float(values[-1]) > SINGULAR * float(values[0]):
        return None
    plain = problem.metric.root is None
    left, values, right = problem.triplets if plain else singular_triplets(problem.weight)
    rank = int((values > SINGULAR * values[0]).sum())
    if not 0 < rank <= problem.max_components or rank >= min(m, n) or 2 * max(m, n) * rank**2 * 4 > LARGEST_WORK:
        return None
    # Between rounding and signal: the geometric mean of both sides of the gap in the spectrum.
    noise = max(float(values[rank] / values[0]), 1e-14)
    tolerance = (noise * float(values[rank - 1] / values[0])) ** 0.5
    found = _from_columns(problem.weight, right[:rank].T, tolerance, problem.allowed, problem.rows, problem.cols)
    for turned in _from_columns(
        problem.weight.T, left[:, :rank], tolerance, problem.allowed, problem.cols, problem.rows
    ):
        found.append(StructuredMatrix.from_factors(turned.v, turned.u, turned.cols, turned.rows))
    good = [matrix for matrix in found if matrix.stored <= problem.allowed and problem.error(matrix) < EXACT]
    return min(good, key=lambda matrix: int(matrix.component_multiply_adds.sum()), default=None)
