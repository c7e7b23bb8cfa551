r"""Low rank plus interval pursuit, ``W ~ A C + sum_k u_k v_k^T`` with u_k and v_k on intervals, within a budget.

*State.* A low-rank part A C of rank r, which takes what is spread over all of the matrix and is counted in trapezoid
form, and K local rank-1 blocks. Block k has non-zero entries on a row interval I_k and a column interval J_k alone, and
costs |I_k| + |J_k| multiply-adds. r is fixed from the start, as a share of the rank that would cost all of the budget.

*What is minimised.* With g the least gain per multiply-add, the squared error that each multiply-add must save,

    || W - A C - sum_k u_k v_k^T ||^2  +  g sum_k (|I_k| + |J_k|).

g is not given: it rises while the blocks cost more than the budget and falls while they cost less. The net gain of a
block is by how much the first term grows without it, less g times its multiply-adds.

*A round* adds candidates and then sweeps:

1. Candidates (:mod:`gblr_plugin.decomposition.search`): on overlapping tiles of the residual, the rank-1 block of
   singular value s has the net gain s^2 - g (|I| + |J|). Those of largest net gain that do not overlap much replace the
   blocks of least net gain.
2. A sweep (:mod:`gblr_plugin.decomposition.alternation`): all row factors are fitted jointly given the column factors;
   each index of a row interval then has a gain: by how much the error would grow if the interval left the index out.
   Each block takes the interval whose gains exceed g times its width by most, and is dropped if it has no net gain.
   The columns follow in the same manner, then A C.

*The end.* If windows save more than the trapezoid form, A C becomes r components that are each zero on a window of one
axis (:mod:`gblr_plugin.decomposition.windows`); from then on they are treated like the blocks. The last sweeps first
choose intervals by the g that meets the budget, and then keep the intervals and fit the factors alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..matrix.structure import StructuredMatrix
from ..matrix.trapezoid_form import trapezoid_form
from .alternation import BY_BUDGET, BY_GAIN, FIXED, Alternation
from .effort import LARGE, Effort, default_effort, default_shares
from .exact import lines
from .problem import Problem
from .recovery.shortest import shortest
from .search import find_blocks
from .spans import Spans
from .state import State, norms, orthonormal
from .trapezoid import trapezoid
from .windows import with_windows

__all__ = ["finished", "pursuit"]

TRAINABLE_RIDGE = 1e-4
"""Ridge of the last fit if the factors will be trained. Without it, components on few indices may nearly cancel at
thousands of times the size of their sum, and stop cancelling in training. The ridge raises the error by 2e-4 of it."""


def pursuit(problem: Problem, effort: Effort | None = None) -> StructuredMatrix:
    """Low rank plus interval pursuit within the budget; deterministic for a seed.

    A matrix that equals a sum of few blocks is returned as this sum, exactly. The search runs in float32 (with a metric
    of inputs in float64, since its whitening is badly conditioned); the last fit is in float64.

    Args:
        problem: The matrix, its budget, grids, metric and seed.
        effort: How much time the search takes; by default it depends on the size of the matrix.
    """
    exact = shortest(problem) or lines(problem)
    if exact is not None:
        return exact
    effort = default_effort(problem) if effort is None else effort
    shares = default_shares(problem) if effort.rank_share is None else [effort.rank_share]
    found = [_with_share(problem, effort, share) for share in shares]
    return min(found, key=problem.error) if len(found) > 1 else found[0]


def _with_share(problem: Problem, effort: Effort, share: float) -> StructuredMatrix:
    """Pursuit with a low-rank part of this share of the largest rank; trapezoid form if no blocks fit beside it."""
    m, n = problem.weight.shape
    dtype = torch.float32 if problem.metric.root is None else torch.float64
    for as_trapezoids in (True, False):  # on whole axes where no trapezoid form is stable
        costs = problem.trapezoid_cost() if as_trapezoids else torch.arange(min(m, n) + 1) * (m + n)
        rank = int(share * (int((costs <= problem.max_multiply_adds).sum()) - 1))
        left_over = problem.max_multiply_adds - int(costs[rank])
        if left_over < 2 * max(problem.rows.tile, problem.cols.tile) or rank == problem.max_components:
            return trapezoid(problem)
        fits = Alternation(problem, left_over, dtype)
        rounds = _Rounds(problem, fits, problem.max_components - rank, effort)
        state = rounds.grow(rounds.start(rank, dtype))
        found = _in_windows(problem, effort, fits.min_gain, state, dtype) if as_trapezoids else None
        found = found or finished(problem, rounds.meet_budget(state), rank, as_trapezoids)
        if found is not None:
            return found
    raise AssertionError("a low-rank part on whole axes needs no trapezoid form")


class _Rounds:
    """Runs the rounds of the pursuit: each adds blocks, then fits all factors in sweeps.

    Args:
        problem: The matrix and its budget.
        fits: Fits factors to the matrix.
        count: Most blocks in the result.
        effort: How many rounds, sweeps and candidates.
    """

    def __init__(self, problem: Problem, fits: Alternation, count: int, effort: Effort) -> None:
        self.problem, self.fits, self.count, self.effort = problem, fits, count, effort

    def start(self, rank: int, dtype: torch.dtype) -> State:
        """The low-rank part without blocks; also sets the first least gain, from the error of the low-rank part."""
        left, right = self.problem.triplets[0][:, :rank].to(dtype), self.problem.triplets[2][:rank].to(dtype)
        target = self.fits.whitened_target
        self.fits.min_gain = self.effort.min_gain * float((target - left @ (left.T @ target)).square().mean())
        u, v = target.new_zeros(0, target.shape[0]), target.new_zeros(0, target.shape[1])
        rows, cols = (Spans.none(grid, target.device) for grid in (self.problem.rows, self.problem.cols))
        return State(u, v, rows, cols, left, right, v, v[:, 0])

    def grow(self, state: State) -> State:
        """All rounds: add blocks, then sweep. The first rounds hold more blocks than the result may."""
        rounds = self.effort.rounds
        for index in range(rounds):
            surplus = 1 + (self.effort.surplus - 1) * max(0.0, 1 - index / max(1, rounds - 3))
            state = self._add(state, int(self.count * surplus), self.problem.seed + index)
            for _ in range(self.effort.sweeps):
                state = self.fits.sweep(state, BY_GAIN, self.effort.momentum)
        return state.best(self.count)

    def _add(self, state: State, count: int, seed: int) -> State:
        """Drop the blocks of least net gain, then add the best candidates until there are ``count`` blocks."""
        state = state.best(count - int(self.effort.renew * count))
        wanted = count - len(state.u)
        if wanted <= 0:
            return state
        grids, fits = (self.problem.rows, self.problem.cols), self.fits
        generator = torch.Generator().manual_seed(seed)
        offset = [int(torch.randint(g.cells, (1,), generator=generator)) * g.tile if g.cyclic else 0 for g in grids]
        residual = fits.residual(state)
        residual = residual - (residual @ state.right.T) @ state.right
        # With a moment H of inputs, blocks are sought in the residual R times H, each column over its input's size.
        scale = None if fits.moment is None else fits.moment.diagonal().rsqrt()
        if fits.root is not None and scale is not None:
            residual = (residual @ fits.root.T) * scale
        extra = self.effort.extra_candidates
        found = find_blocks(
            residual,
            *grids,
            count=wanted,
            candidates=3 * wanted if extra is None else min(3 * wanted, wanted + extra),
            min_gain=fits.min_gain,
            shapes=self._tile_shapes(),
            refine=self.effort.refine,
            overlap=self.effort.overlap,
            offset=(offset[0], offset[1]),
        )
        return state.with_blocks(found if scale is None else replace(found, v=found.v * scale))

    def _tile_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of the tiles that are searched: complete cells, in two sizes, the second twice the first."""
        side = self.effort.tile_scale * (self.fits.max_multiply_adds / self.count / 2) ** 0.75
        grids = self.problem.rows, self.problem.cols
        small = [min(max(1, round(side / grid.tile)), grid.cells) for grid in grids]
        shapes = [
            [min(scale * c, grid.cells) * grid.tile for c, grid in zip(small, grids, strict=True)] for scale in (1, 2)
        ]
        return [(height, width) for height, width in shapes]

    def meet_budget(self, state: State) -> State:
        """Sweeps that choose intervals within the budget, then sweeps that fit the factors alone."""
        for mode in [BY_BUDGET] * 2 + [FIXED] * self.effort.polish:
            state = self.fits.sweep(state, mode, self.effort.momentum)
        return state

    def meet_budget_with_windows(self, state: State) -> State:
        """Sweeps that fit factors, then sweeps that choose intervals within the budget, then sweeps that fit factors.

        Blocks are added before two of these sweeps. Momentum grows with each sweep, and returns to 0 if the error grew.
        """
        effort, fits = self.effort, self.fits
        modes = [FIXED] * 2 + [BY_BUDGET] * effort.choices + [FIXED] * effort.polish
        momentum, last = 0.0, 0.0
        for index, mode in enumerate(modes):
            fits.refit_full = 2 + effort.choices // 3 <= index < 2 + effort.choices
            if index in (4, 6):
                state = self._add(state, self.count, self.problem.seed + effort.rounds + index)
                momentum, last = 0.0, 0.0
            trial = fits.sweep(state, mode, momentum)
            if fits.explained < last and momentum > 0:
                momentum = 0.0
                trial = fits.sweep(state, mode, momentum)
            else:
                momentum = min(effort.momentum, momentum + 0.4)
            state, last = trial, fits.explained
        return state


def _in_windows(
    problem: Problem, effort: Effort, min_gain: float, state: State, dtype: torch.dtype
) -> StructuredMatrix | None:
    """The result with a low-rank part on windows, in the Frobenius norm; ``None`` if the trapezoid form is better.

    Large matrices keep the trapezoid form. So do matrices from which a training starts: a layer trains a trapezoid form
    in low-rank form, whose factors can be orthogonal, while the factors on windows are far from orthogonal.
    """
    rank = state.left.shape[1]
    if problem.metric.root is not None or problem.trains or rank < 2 or problem.weight.numel() >= LARGE:
        return None
    opened = with_windows(state, problem, min_gain)
    if opened is None:
        return None
    fits = Alternation(problem, problem.max_multiply_adds, dtype)
    fits.min_gain = min_gain
    rounds = _Rounds(problem, fits, problem.max_components, effort)
    found = finished(problem, rounds.meet_budget_with_windows(opened.to(dtype)), 0, True)
    return found if found is not None and math.isfinite(problem.error(found)) else None


def finished(problem: Problem, state: State, rank: int, as_trapezoids: bool) -> StructuredMatrix | None:
    """Blocks and low-rank part in one matrix, fitted once more in float64.

    Args:
        problem: The matrix.
        state: Blocks on their final intervals, and the low-rank part.
        rank: Rank of the low-rank part.
        as_trapezoids: Whether to write the low-rank part in trapezoid form, or else in low-rank form.

    Returns:
        The matrix, or ``None`` where no trapezoid form is stable.
    """
    fits = Alternation(problem, 0, torch.float64, TRAINABLE_RIDGE if problem.trains else None)
    state = state.to(torch.float64)
    state = replace(state, left=orthonormal(state.left), right=orthonormal(state.right.T).T)
    state = fits.fit_cols(fits.fit_rows(state, FIXED), FIXED)
    size = (norms(state.u) / norms(state.v)).sqrt()
    blocks = StructuredMatrix.from_factors(
        state.u / size, state.v * size, state.rows.intervals(), state.cols.intervals()
    )
    if rank == 0:
        return blocks
    coefficients = problem.metric.unwhiten(state.left.T @ fits.residual(state))
    if as_trapezoids:
        low = trapezoid_form(state.left, coefficients, problem.rows, problem.cols)
    else:
        size = norms(coefficients).sqrt()
        low = StructuredMatrix.from_factors((state.left * size.T).T.contiguous(), coefficients / size)
    return None if low is None else StructuredMatrix.sum([low, blocks])
