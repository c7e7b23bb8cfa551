r"""Low rank plus interval pursuit: ``W ~ A C + sum_k u_k v_k^T`` with u_k, v_k on intervals.

A low-rank part takes what is spread over the whole matrix and is priced as trapezoids; local rank-1 blocks take what
is left where it is dense. Rounds add the blocks that pay most, then alternate between the sides: all factors of one
side are fitted jointly by least squares (the low-rank part is projected out exactly), and each interval is re-chosen
as the maximum-sum interval of the joint gains less the price of a multiply-add. The price rises and falls until the
cost meets the budget; the last sweeps keep the intervals and only fit. Before these, the low-rank part becomes
components that leave out windows of an axis (:mod:`gblr_plugin.decomposition.recovery.windows`), which from then on are
components like the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..matrix.structure import StructuredMatrix
from ..matrix.tiles import TiledAxis
from ..matrix.trapezoid_form import trapezoid_form
from .effort import LARGE, Effort, default_effort, default_shares
from .exact import lines
from .joint import conjugate_gradient, gram_matrix, supported_solve
from .problem import Problem
from .recovery.shortest import shortest
from .recovery.windows import best_windows
from .search import find_blocks
from .spans import Spans, best_spans, cell_sums, joint_gains
from .trapezoid import trapezoid

__all__ = ["pursuit"]

CG_STEPS = 12
CHEAPER = 16
"""Cuts of the price, by a third each, that are tried where blocks cost less than the budget allows."""
PRICES = 10
"""Prices tried between one that is too low and one that is not."""
NEAR = 2e-4
"""Part of the budget that may be left."""
TRAINABLE_RIDGE = 1e-4
"""Of the last fit where factors will be trained: components on few indices may nearly cancel at thousands of times
the size of what is left, and tear apart in training. Costs 2e-4 of the error."""
WIDE = 512
"""Columns from which the gains in a metric use a lower bound instead of an inverse of the moment on the interval."""


@dataclass(frozen=True, eq=False)
class _State:
    """Local blocks u (K, m), v (K, n) and bases of the low-rank part.

    ``left`` (m, r) spans its columns; ``right`` (r, n), orthonormal, its rows in whitened coordinates. ``last_v`` is v
    one sweep ago, ``worth`` (K,) what the error would grow by without each block, less its price, at the last choice.
    """

    u: Tensor
    v: Tensor
    rows: Spans
    cols: Spans
    left: Tensor
    right: Tensor
    last_v: Tensor
    worth: Tensor

    def cost(self) -> int:
        return int((self.rows.widths() + self.cols.widths()).sum())

    def to(self, dtype: torch.dtype) -> _State:
        names = ("u", "v", "left", "right", "last_v", "worth")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def live(self, worth: Tensor) -> _State:
        """The blocks of positive worth."""
        state, stays = replace(self, worth=worth), worth > 0
        return state if bool(stays.all()) else state.select(stays)

    def select(self, index: Tensor) -> _State:
        rows, cols = self.rows.select(index), self.cols.select(index)
        u, v, last_v, worth = (part[index] for part in (self.u, self.v, self.last_v, self.worth))
        return replace(self, u=u, v=v, last_v=last_v, worth=worth, rows=rows, cols=cols)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp(min=1e-30)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


class _Pursuit:
    """The target, its price list and the budget; methods take and return states."""

    def __init__(self, problem: Problem, rank: int, allowed: int, effort: Effort, dtype: torch.dtype) -> None:
        self.problem = problem
        self.allowed = allowed
        self.effort = effort
        self.count = problem.max_components - rank
        metric = problem.metric
        self.weighted = metric.root is not None
        self.target = problem.weight.to(dtype)
        self.seen = metric.whiten(problem.weight).to(dtype)
        self.root = None if metric.root is None else metric.root.to(dtype)
        self.moment = None if metric.moment is None else metric.moment.to(dtype)
        self.spare = None if metric.moment is None else 1 / torch.linalg.inv(metric.moment).diagonal().to(dtype)
        self.price = 0.0
        self.ridge: float | None = None
        self.explained = 0.0  # squares of the target that the last fit accounts for
        self.free = False  # whether components on a whole axis are fitted, and may shrink, like any other

    def whiten(self, v: Tensor) -> Tensor:
        return v if self.root is None else v @ self.root

    def residual(self, state: _State) -> Tensor:
        """What the local blocks leave, in whitened coordinates."""
        return self.seen - state.u.T @ self.whiten(state.v)

    def refreshed(self, state: _State) -> _State:
        """The low-rank part turned towards the leading singular vectors of what the blocks leave."""
        if state.left.shape[1] == 0:
            return state
        seen, u, v = self.seen, state.u, self.whiten(state.v)
        left = seen @ state.right.T - u.T @ (v @ state.right.T)
        return replace(state, left=left, right=_orthonormal(seen.T @ left - v.T @ (u @ left)).T)

    def _choose(
        self, gains: Tensor, grid: TiledAxis, other: Tensor, exact: bool, spent: int = 0
    ) -> tuple[Spans, Tensor]:
        """Intervals at the present price, or at the price at which all together cost no more than is allowed.

        Args:
            gains: (K, cells) of covering each cell.
            grid: The axis.
            other: (K,) widths on the other axis.
            exact: Whether to find the price.
            spent: What else is paid for from the budget.

        Returns:
            The intervals, and the (K,) worth of each component, which stays where that is positive.
        """

        def at(price: float) -> tuple[Spans, Tensor, int]:
            spans, net = best_spans(gains, grid, price)
            worth = net - price * other
            return spans, worth, spent + int(((spans.widths() + other) * (worth > 0)).sum())

        best = at(self.price)
        if not exact:
            return best[:2]
        low = high = self.price
        above = below = best[2]  # costs at either price
        while below > self.allowed:
            low, above, high = high, below, high * 1.3
            best = at(high)
            below = best[2]
        for _ in range(CHEAPER if low == high else 0):  # what is left of the budget buys wider intervals
            low /= 1.5
            trial = at(low)
            above = trial[2]
            if above > self.allowed:
                break
            high, below, best = low, above, trial
        for step in range(PRICES):
            if below >= (1 - NEAR) * self.allowed or above <= self.allowed:
                break
            share = (above - self.allowed) / (above - below) if step % 2 else 0.5
            middle = low * (high / low) ** min(max(share, 0.05), 0.95)
            trial = at(middle)
            if trial[2] > self.allowed:
                low, above = middle, trial[2]
            else:
                high, below, best = middle, trial[2], trial
        self.price = high
        return best[:2]

    def fit_rows(self, state: _State, mode: str) -> _State:
        """Row factors of the blocks and columns of the low-rank part, jointly, given the column factors."""
        state = replace(state, v=state.v / _norms(self.whiten(state.v)))
        spans, worth, u, left = self._fit(
            self.seen, state.right, self.whiten(state.v), state.rows, state.cols.widths(), mode
        )
        state = state.live(worth)
        return replace(state, u=u, rows=spans, left=_orthonormal(left))

    def fit_cols(self, state: _State, mode: str) -> _State:
        """Column factors of the blocks and rows of the low-rank part, jointly, given the row factors."""
        size = _norms(state.u)
        state = replace(state, u=state.u / size)
        if self.weighted:
            return self._fit_weighted_cols(replace(state, v=state.v * size), mode)
        spans, worth, v, right = self._fit(self.seen.T, state.left.T, state.u, state.cols, state.rows.widths(), mode)
        state = state.live(worth)
        return replace(state, v=v, cols=spans, right=_orthonormal(right).T)

    def _fit(
        self, target: Tensor, basis: Tensor, other: Tensor, spans: Spans, other_cost: Tensor, mode: str
    ) -> tuple[Spans, Tensor, Tensor, Tensor]:
        """As `_fit_local`, where components on the whole axis may be a low-rank part.

        They are fitted on all indices alike, so that they are projected out at once, and stay as they are.
        """
        whole = spans.cells == spans.grid.cells
        spent = int((spans.widths() + other_cost)[whole].sum())
        if self.free or len(basis) or not 0 < spent <= self.allowed:
            return self._fit_local(target, basis, other, spans, other_cost, mode, 0)
        local = ~whole
        basis, corner = torch.linalg.qr(other[whole].T)
        chosen, worth, factors, rest = self._fit_local(
            target, basis.T, other[local], spans.select(local), other_cost[local], mode, spent
        )
        every = worth.new_full((len(whole),), math.inf)
        every[local] = worth
        live = every > 0
        place = torch.arange(int(live.sum()), device=whole.device)
        of_whole, of_local = place[whole[live]], place[local[live]]
        result = factors.new_zeros(len(place), factors.shape[1])
        result[of_whole] = torch.linalg.solve_triangular(corner, rest.T, upper=True)
        result[of_local] = factors
        order = torch.argsort(torch.cat([of_whole, of_local]))
        return spans.select(whole).join(chosen).select(order), every, result, rest[:, :0]

    def _fit_local(
        self,
        target: Tensor,
        basis: Tensor,
        other: Tensor,
        spans: Spans,
        other_cost: Tensor,
        mode: str,
        spent: int,
    ) -> tuple[Spans, Tensor, Tensor, Tensor]:
        """One side of the alternation.

        Args:
            target: (N, M), N being the axis fitted.
            basis: (r, M) orthonormal rows, fixed side of the low-rank part.
            other: (K, M) fixed factors of the blocks.
            spans: Present intervals on the axis of length N.
            other_cost: (K,) widths on the other side.
            mode: ``"grow"``, ``"exact"`` or ``"fixed"``.
            spent: What else is paid for from the budget.

        Returns:
            New intervals and (K,) worth, positive for the components that stay; the intervals and the factors are
            those of these only. The free side of the low-rank part, (N, r).
        """
        shared = other @ basis.T
        image = target @ basis.T
        gram = gram_matrix(other).addmm_(shared, shared.T, alpha=-1)
        right = (other @ target.T).addmm_(shared, image.T, alpha=-1)
        worth = other.new_ones(len(other))
        if mode != "fixed":
            support = spans.support()
            fitted, inside = supported_solve(gram, right, support, want_gains=True)
            assert inside is not None
            scale = 1 / gram.diagonal().clamp(min=1e-12)
            gains = joint_gains(inside, right, gram @ fitted, support, scale, spans.grid)
            spans, worth = self._choose(gains, spans.grid, other_cost, mode == "exact", spent)
            live = worth > 0
            if not bool(live.all()):
                spans, gram, right = spans.select(live), gram[live][:, live], right[live]
        factors, _ = supported_solve(gram, right, spans.support(), ridge=self.ridge)
        self.explained = float((factors * right).sum() + image.square().sum())
        return spans, worth, factors, image - factors.T @ shared[worth > 0]

    def _fit_weighted_cols(self, state: _State, mode: str) -> _State:
        """As `_fit` for columns that couple through the second moment: conjugate gradients on the normal equations."""
        assert self.moment is not None
        assert self.spare is not None
        shared = state.u @ state.left
        gram = state.u @ state.u.T - shared @ shared.T
        image = state.u @ self.target - shared @ (state.left.T @ self.target)
        right = image @ self.moment
        support = state.cols.support()
        v = conjugate_gradient(gram, self.moment, right, support, state.v * support, CG_STEPS)
        if mode != "fixed":
            level = gram.diagonal().clamp(min=1e-12)[:, None]
            slope = right - gram @ v @ self.moment
            outside = slope.square() / (level * self.moment.diagonal())
            inside = v.square() * level * self.spare
            narrow = state.cols.widths() <= WIDE
            if bool(narrow.any()):
                _, worth = supported_solve(self.moment, self.moment @ v[narrow].T, support[narrow].T, want_gains=True)
                assert worth is not None
                inside[narrow] = worth.T * level[narrow]
            gains = cell_sums(torch.where(support, inside, outside), state.cols.grid)
            spans, worth = self._choose(gains, state.cols.grid, state.rows.widths(), mode == "exact")
            live = worth > 0
            state = replace(replace(state, worth=worth).select(live), cols=spans.select(live))
            gram, right, v = gram[live][:, live], right[live], v[live]
            support = state.cols.support()
            v = conjugate_gradient(gram, self.moment, right, support, v * support, CG_STEPS)
        state = replace(state, v=v)
        return replace(state, right=_orthonormal(self.residual(state).T @ state.left).T)

    def _tiles(self) -> list[tuple[int, int]]:
        """Heights and widths of the tiles searched, whole cells, twice as large the second time."""
        side = self.effort.tile_scale * (self.allowed / self.count / 2) ** 0.75
        grids = self.problem.rows, self.problem.cols
        small = [min(max(1, round(side / grid.tile)), grid.cells) for grid in grids]
        return [
            (
                min(scale * small[0], grids[0].cells) * grids[0].tile,
                min(scale * small[1], grids[1].cells) * grids[1].tile,
            )
            for scale in (1, 2)
        ]

    def kept(self, state: _State, count: int) -> _State:
        """At most ``count`` blocks, those worth most."""
        if len(state.u) <= count:
            return state
        return state.select(torch.argsort(state.worth, descending=True, stable=True)[:count].sort().values)

    def add(self, state: _State, count: int, seed: int) -> _State:
        """Give up the blocks worth least, then add those that pay most for what is left, up to ``count`` in all."""
        state = self.kept(state, count - int(self.effort.renew * count))
        room = count - len(state.u)
        if room <= 0:
            return state
        grids = self.problem.rows, self.problem.cols
        generator = torch.Generator().manual_seed(seed)
        offset = [int(torch.randint(g.cells, (1,), generator=generator)) * g.tile if g.cyclic else 0 for g in grids]
        residual = self.residual(state)
        residual = residual - (residual @ state.right.T) @ state.right
        # In a metric, a block gains by correlation with the inputs: columns of R H over the size of their input.
        scale = None if self.moment is None else self.moment.diagonal().rsqrt()
        if self.root is not None and scale is not None:
            residual = (residual @ self.root.T) * scale
        found = find_blocks(
            residual,
            *grids,
            count=room,
            candidates=3 * room if self.effort.spare is None else min(3 * room, room + self.effort.spare),
            price=self.price,
            shapes=self._tiles(),
            refine=self.effort.refine,
            overlap=self.effort.overlap,
            offset=(offset[0], offset[1]),
        )
        v = found.v if scale is None else found.v * scale
        return replace(
            state,
            u=torch.cat([state.u, found.u]),
            v=torch.cat([state.v, v]),
            last_v=torch.cat([state.last_v, v]),
            worth=torch.cat([state.worth, v.new_zeros(len(v))]),
            rows=state.rows.join(found.rows),
            cols=state.cols.join(found.cols),
        )

    def start(self, left: Tensor, right: Tensor) -> _State:
        """No blocks yet; the price in proportion to what the low-rank part leaves."""
        m, n = self.target.shape
        device = self.target.device
        none = Spans.none(self.problem.rows, device), Spans.none(self.problem.cols, device)
        empty = self.target.new_zeros(0, n)
        state = _State(self.target.new_zeros(0, m), empty, *none, left, right, empty, empty[:, 0])
        self.price = self.effort.price * float((self.seen - left @ (left.T @ self.seen)).square().mean())
        return state

    def sweep(self, state: _State, mode: str, momentum: float | None = None) -> _State:
        """Both sides once; the column factors are extrapolated first, which speeds up the alternation."""
        momentum = self.effort.momentum if momentum is None else momentum
        step = (state.v - state.last_v).mul_(state.cols.support())
        ahead = state.v.add(step, alpha=momentum)
        state = replace(state, v=ahead, last_v=state.v)
        state = self.fit_cols(self.fit_rows(state, mode), mode)
        if mode != "fixed":
            state = self.refreshed(state)
        if mode == "grow":
            ratio = max(state.cost(), 1) / self.allowed
            self.price *= min(1.25, max(0.9, ratio**0.7))
        return state

    def grown(self, state: _State) -> _State:
        """All rounds: add blocks, then sweep."""
        rounds = self.effort.rounds
        for index in range(rounds):
            crowd = 1 + (self.effort.crowd - 1) * max(0.0, 1 - index / max(1, rounds - 3))
            state = self.add(state, int(self.count * crowd), self.problem.seed + index)
            for _ in range(self.effort.sweeps):
                state = self.sweep(state, "grow")
        return self.kept(state, self.count)

    def settled(self, state: _State) -> _State:
        """The budget met, then the factors fitted."""
        for mode in ["exact"] * 2 + ["fixed"] * self.effort.polish:
            state = self.sweep(state, mode)
        return state

    def opened(self, state: _State) -> tuple[_Pursuit, _State] | None:
        """The low-rank part as components that leave out windows, where these save more than trapezoids.

        They are ordinary components then, in a task of their own. Their factors are far from orthogonal, so that they
        are computed in float64.
        """
        rank = state.left.shape[1]
        problem = self.problem
        if self.weighted or problem.trains or rank < 2 or self.target.numel() >= LARGE:
            return None
        task = _Pursuit(problem, 0, problem.allowed, self.effort, self.target.dtype)
        task.price = self.price
        state = state.to(torch.float64)
        rest = problem.weight - state.u.T @ state.v
        left = _orthonormal(rest @ state.right.T)
        right, corner = torch.linalg.qr(rest.T @ left)  # what blocks leave is left corner^T right^T
        saved = rank * sum(self.target.shape) - int(problem.trapezoid_cost()[rank])
        factors, grids = (left @ corner.T, right @ corner), (problem.rows, problem.cols)
        axis, windows = 0, best_windows(factors[0], grids[0], self.price, self.price * saved)
        least = self.price * saved if windows is None else windows.net
        better = best_windows(factors[1], grids[1], self.price, least)
        if better is not None:
            axis, windows = 1, better
        if windows is None:
            return None
        # The other factor, full, fitted to the low-rank part.
        fit = torch.linalg.pinv(windows.factor.T) @ factors[axis]
        other = grids[1 - axis]
        every = torch.zeros(rank, dtype=torch.int64, device=fit.device)
        full = Spans(every + other.cells, every, other)
        if axis == 0:
            u, v, rows, cols = windows.factor, fit @ right.T, windows.spans, full
        else:
            u, v, rows, cols = fit @ left.T, windows.factor, full, windows.spans
        size = _norms(u)
        v = v * size
        return task, _State(
            torch.cat([u / size, state.u]),
            torch.cat([v, state.v]),
            rows.join(state.rows),
            cols.join(state.cols),
            u.new_zeros(u.shape[1], 0),
            v.new_zeros(0, v.shape[1]),
            torch.cat([v, state.v]),
            torch.cat([v.new_full((rank,), float("inf")), state.worth]),
        ).to(self.target.dtype)

    def tightened(self, state: _State) -> _State:
        """Fits, then choices of intervals within the budget, blocks being added twice, then fits.

        Momentum grows from sweep to sweep, and starts anew where it made the error grow.
        """
        effort = self.effort
        chosen = ["exact"] * effort.settle
        momentum, last = 0.0, 0.0
        for index, mode in enumerate(["fixed"] * 2 + chosen + ["fixed"] * effort.polish):
            self.free = 2 + effort.settle // 3 <= index < 2 + effort.settle
            if index in (4, 6):
                state = self.add(state, self.count, self.problem.seed + effort.rounds + index)
                momentum, last = 0.0, 0.0
            trial = self.sweep(state, mode, momentum)
            if self.explained < last and momentum > 0:
                momentum = 0.0
                trial = self.sweep(state, mode, momentum)
            else:
                momentum = min(effort.momentum, momentum + 0.4)
            state, last = trial, self.explained
        return state


def _finished(problem: Problem, state: _State, rank: int, gauged: bool) -> StructuredMatrix | None:
    """Blocks and gauged low-rank part in one matrix, fitted once more in float64; ``None`` where the gauge fails."""
    exact = _Pursuit(problem, rank, 0, Effort(), torch.float64)
    exact.ridge = TRAINABLE_RIDGE if problem.trains else None
    state = state.to(torch.float64)
    state = replace(state, left=_orthonormal(state.left), right=_orthonormal(state.right.T).T)
    state = exact.fit_cols(exact.fit_rows(state, "fixed"), "fixed")
    size = (_norms(state.u) / _norms(state.v)).sqrt()
    blocks = StructuredMatrix.from_factors(
        state.u / size, state.v * size, state.rows.intervals(), state.cols.intervals()
    )
    if rank == 0:
        return blocks
    shape = problem.metric.unwhiten(state.left.T @ exact.residual(state))
    if gauged:
        low = trapezoid_form(state.left, shape, problem.rows, problem.cols)
    else:
        norms = _norms(shape).sqrt()
        low = StructuredMatrix.from_factors((state.left * norms.T).T.contiguous(), shape / norms)
    return None if low is None else StructuredMatrix.sum([low, blocks])


def pursuit(problem: Problem, effort: Effort | None = None) -> StructuredMatrix:
    """Low rank plus interval pursuit within the budget; deterministic for a seed.

    Works in float32 (float64 in a metric, whose whitening is badly conditioned) and finishes in float64.

    Args:
        problem: The matrix, its budget, grids, metric and seed.
        effort: How much is tried; default by size.
    """
    whole = shortest(problem) or lines(problem)
    if whole is not None:
        return whole
    effort = default_effort(problem) if effort is None else effort
    shares = default_shares(problem) if effort.rank_share is None else [effort.rank_share]
    found = [_with_share(problem, effort, share) for share in shares]
    return min(found, key=problem.error) if len(found) > 1 else found[0]


def _with_share(problem: Problem, effort: Effort, share: float) -> StructuredMatrix:
    m, n = problem.weight.shape
    dtype = torch.float32 if problem.metric.root is None else torch.float64
    for gauged in (True, False):
        costs = problem.trapezoid_cost() if gauged else torch.arange(min(m, n) + 1) * (m + n)
        bought = int((costs <= problem.allowed).sum()) - 1
        rank = int(share * bought)
        allowed = problem.allowed - int(costs[rank])
        if allowed < 2 * max(problem.rows.tile, problem.cols.tile) or rank == problem.max_components:
            return trapezoid(problem)  # nothing is left for blocks
        task = _Pursuit(problem, rank, allowed, effort, dtype)
        left, _, right = problem.triplets
        state = task.grown(task.start(left[:, :rank].to(dtype), right[:rank].to(dtype)))
        opened = task.opened(state) if gauged else None
        if opened is not None:
            found = _finished(problem, opened[0].tightened(opened[1]), 0, gauged)
            if found is not None and math.isfinite(problem.error(found)):
                return found
        found = _finished(problem, task.settled(state), rank, gauged)
        if found is not None:
            return found
    raise AssertionError("a low-rank part on full widths needs no gauge")
