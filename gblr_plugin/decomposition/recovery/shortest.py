r"""Exact recovery: writes a low-rank matrix W that equals a sum of components as such a sum, with few multiply-adds.

1. For each index, ``shortest_vectors`` of :mod:`~gblr_plugin.decomposition.recovery.vanishing` finds the vectors of W's
   row space that are zero off the shortest intervals ending at that index. The shortest independent vectors become the
   column factors: a basis of least total width, since a greedy choice of independent vectors is optimal (a matroid).
2. Least squares gives the row factors.
3. :class:`~gblr_plugin.decomposition.recovery.exchange.Exchange` adds components' factors to each other, which leaves
   the product unchanged, as long as the intervals get shorter in total.

A sum of blocks on intervals is recovered at its true cost. A matrix of low rank without other structure takes the
trapezoid form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...matrix.structure import StructuredMatrix
from ...matrix.svd import singular_triplets
from ...matrix.tiles import TiledAxis
from ..joint import supported_solve
from ..problem import Problem
from ..spans import Spans
from ..trapezoid import trapezoid
from .exchange import Exchange, Side
from .vanishing import shortest_vectors

__all__ = ["shortest"]

EXACT = 1e-5
"""Largest relative error of what is called the matrix itself."""
SINGULAR = 1e-6
"""Singular values below this share of the first are rounding."""
GAP = 1e-3
"""Largest ratio of the first singular value that counts as rounding to the last one that does not."""
INDEPENDENT = 1e-3
"""Least share of its norm by which an independent row differs: above rounding, below small coefficients."""
INDEPENDENT_IN_CELL = 1e-2
"""The same for tiles larger than 1, where a larger share gives better conditioned bases."""
LARGEST_TABLE = 1 << 26
"""Entries of the Gram matrices of all windows, beyond which exact recovery is not tried."""
LARGEST_WORK = 1 << 35
"""Multiply-adds (about) after which no further exchange is looked for."""
FITS = 10
"""Alternating fits of the factors on the intervals found."""
RIDGE = 1e-13
"""Ridge of these fits: blocks that begin or end together leave Gram matrices that are nearly singular."""


def _independent(vectors: Tensor, count: int, least: float) -> list[int]:
    """Positions of the first ``count`` rows of (N, d) that, at norm 1, are ``least`` from the span of those kept."""
    basis = vectors.new_zeros(0, vectors.shape[1])
    kept: list[int] = []
    for index, vector in enumerate(vectors):
        rest = vector / torch.linalg.vector_norm(vector)
        for _ in range(2):
            rest = rest - (basis @ rest) @ basis
        size = torch.linalg.vector_norm(rest)
        if float(size) > least:
            basis = torch.cat([basis, (rest / size)[None]])
            kept.append(index)
            if len(kept) == count:
                break
    return kept


def _basis(space: Tensor, grid: TiledAxis, noise: float) -> Side | None:
    """Vectors on the shortest intervals that span the same space as ``space`` (r, n)."""
    least = INDEPENDENT if grid.tile == 1 else INDEPENDENT_IN_CELL
    cells, start, coefficients = shortest_vectors(space, grid, noise, least)
    order = torch.argsort(Side(coefficients, cells, start, grid).spans().widths(), stable=True)
    kept = order[_independent(coefficients[order], len(space), least)]
    if len(kept) < len(space):
        return None
    vectors = (coefficients[kept] @ space) * Spans(cells[kept], start[kept], grid).support()
    return Side(vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True), cells[kept], start[kept], grid)


def _unstructured(basis: Side) -> bool:
    """Whether the intervals are no shorter than those of a generic space of that rank: there is no structure then."""
    gap = (len(basis.cells) - 1) // basis.grid.tile
    return float(basis.cells.double().mean()) > basis.grid.cells - gap - 0.5


def _fitted(exchange: Exchange, turned: bool) -> StructuredMatrix:
    """Both sides fitted to the target on their intervals; ``turned``: the target is the transposed weight."""
    target, u_spans, v_spans = exchange.target, exchange.rows.spans(), exchange.cols.spans()
    u_support, v_support = u_spans.support(), v_spans.support()
    u, v = exchange.rows.factors, exchange.cols.factors * v_support
    for _ in range(FITS):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-300)
        u, _ = supported_solve(v @ v.T, v @ target.T, u_support, ridge=RIDGE)
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=1e-300)
        v, _ = supported_solve(u @ u.T, u @ target, v_support, ridge=RIDGE)
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-300).sqrt()
    row_side, col_side = (u * size, u_spans.intervals()), (v / size, v_spans.intervals())
    if turned:
        row_side, col_side = col_side, row_side
    return StructuredMatrix.from_factors(row_side[0], col_side[0], row_side[1], col_side[1])


def shortest(problem: Problem) -> StructuredMatrix | None:
    """The weight itself, as components of few multiply-adds; ``None`` if its rank or cost exceeds the budget.

    The result is exact to the precision of the weight. The search is meant for matrices whose rank is well below their
    size. It begins with the columns, then with the rows, and returns the first result that is within the budget.
    """
    m, n = problem.weight.shape
    values = problem.triplets[1]
    if not float(values[0]) > 0 or float(values[-1]) > SINGULAR * float(values[0]):
        return None
    plain = problem.metric.root is None
    left, values, right = problem.triplets if plain else singular_triplets(problem.weight)
    rank = int((values > SINGULAR * values[0]).sum())
    if not 0 < rank <= problem.max_components or rank >= min(m, n) or 2 * max(m, n) * rank**2 > LARGEST_TABLE:
        return None
    noise = float(values[rank] / values[rank - 1])
    if noise > GAP:
        return None
    unstructured = work = 0
    for turned in (False, True):
        target, space = (problem.weight.T, left[:, :rank].T) if turned else (problem.weight, right[:rank])
        rows, cols = (problem.cols, problem.rows) if turned else (problem.rows, problem.cols)
        basis = _basis(space, cols, noise)
        if basis is not None and _unstructured(basis):
            unstructured += 1
            continue
        least_rows = rank * min(rows.tile, rows.length)
        if basis is None or int(basis.spans().widths().sum()) + least_rows > problem.max_multiply_adds:
            continue
        factors = torch.linalg.lstsq(basis.factors.T, target.T).solution
        exchange = Exchange(factors, basis, target, rows, max(100 * noise, 1e-5), LARGEST_WORK - work)
        exchange.run()
        work += exchange.work
        if exchange.cost() <= problem.max_multiply_adds:
            found = _accepted(problem, _fitted(exchange, turned))
            if found is not None:
                return found
    if unstructured < 2:
        return None
    # Neither side has shorter intervals than a generic matrix of that rank: the trapezoid form is then the cheapest.
    return _accepted(problem, trapezoid(replace(problem, max_multiply_adds=int(problem.trapezoid_cost()[rank]))))


def _accepted(problem: Problem, found: StructuredMatrix) -> StructuredMatrix | None:
    """``found`` if it is within the budget and equals the weight, else ``None``."""
    return found if found.stored <= problem.max_multiply_adds and problem.error(found) < EXACT else None
