r"""Alternating least squares over blocks on intervals and a low-rank part, with a choice of intervals in between.

With the column factors fixed, all row factors are fitted together: each row i is a separate small least-squares problem
in the blocks whose row interval covers it (:mod:`gblr_plugin.decomposition.joint`). The low-rank part has a fixed right
basis Q, and adds no unknowns: projecting Q out of the column factors and of the target gives the same solution. With
G = V (I - Q^T Q) V^T and B = V (I - Q^T Q) W^T,

    gain of index i inside interval k     x_ki^2 / (G[S, S]^-1)_kk      S: the blocks that cover i
    gain of index i outside               (B - G X)_ki^2 / G_kk

The first gain is by how much the squared error grows if block k leaves out index i; the second, by how much it falls if
block k alone is fitted to the residual at i. :mod:`gblr_plugin.decomposition.choice` turns gains into new intervals.
The columns are fitted in the same manner with the roles exchanged. In a metric of inputs, however, the columns are
coupled by the second moment, and conjugate gradients replace the small problems.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .choice import Choice, choose, choose_within
from .joint import conjugate_gradient, gram_matrix, supported_solve
from .problem import Problem
from .spans import Spans, cell_sums, joint_gains
from .state import State, norms, orthonormal

__all__ = ["BY_BUDGET", "BY_GAIN", "FIXED", "Alternation", "Mode"]

Mode = Literal["by_gain", "by_budget", "fixed"]
"""How intervals are chosen: by the present least gain per multiply-add, by that which meets the budget, or not."""

BY_GAIN: Mode = "by_gain"
BY_BUDGET: Mode = "by_budget"
FIXED: Mode = "fixed"

CG_STEPS = 12
WIDE = 512
"""Columns from which the gains in a metric use a lower bound instead of an inverse of the moment on the interval."""


class Alternation:
    """Fits blocks and a low-rank part to one weight; its methods take a state and return the next.

    Args:
        problem: The weight, its grids and metric.
        max_multiply_adds: Most multiply-adds of all blocks together.
        dtype: Dtype of the fits.
        ridge: Ridge of the fits on chosen intervals, relative to the mean diagonal; ``None``: a default of the dtype.

    Attributes:
        min_gain: Squared error that one multiply-add must save.
        explained: Squared norm of the target less the squared error, after the last fit.
        refit_full: Whether components on a complete axis get new intervals like all others.
    """

    def __init__(
        self, problem: Problem, max_multiply_adds: int, dtype: torch.dtype, ridge: float | None = None
    ) -> None:
        metric = problem.metric
        self.max_multiply_adds = max_multiply_adds
        self.min_gain = 0.0
        self.explained = 0.0
        self.refit_full = False
        self.target = problem.weight.to(dtype)
        self.whitened_target = metric.whiten(problem.weight).to(dtype)
        self.root = None if metric.root is None else metric.root.to(dtype)
        self.moment = None if metric.moment is None else metric.moment.to(dtype)
        self._ridge = ridge
        self._conditional = None if metric.moment is None else 1 / torch.linalg.inv(metric.moment).diagonal().to(dtype)

    def whiten(self, v: Tensor) -> Tensor:
        """``v @ L`` in the dtype of the fits."""
        return v if self.root is None else v @ self.root

    def residual(self, state: State) -> Tensor:
        """(m, n) target less the blocks, in whitened coordinates; the low-rank part is not subtracted."""
        return self.whitened_target - state.u.T @ self.whiten(state.v)

    def sweep(self, state: State, mode: Mode, momentum: float) -> State:
        """Fit rows, then columns.

        Args:
            state: State before the sweep.
            mode: How intervals are chosen; ``"by_gain"`` also moves the least gain towards the budget.
            momentum: By how much of their last step the column factors are extrapolated first, which speeds up the
                alternation.
        """
        step = (state.v - state.last_v).mul_(state.cols.support())
        state = replace(state, v=state.v.add(step, alpha=momentum), last_v=state.v)
        state = self.fit_cols(self.fit_rows(state, mode), mode)
        if mode != FIXED:
            state = self._turned(state)
        if mode == BY_GAIN:
            ratio = max(state.cost(), 1) / self.max_multiply_adds
            self.min_gain *= min(1.25, max(0.9, ratio**0.7))
        return state

    def _turned(self, state: State) -> State:
        """The low-rank part after one step of subspace iteration towards the residual's leading singular vectors."""
        if state.left.shape[1] == 0:
            return state
        target, u, v = self.whitened_target, state.u, self.whiten(state.v)
        left = target @ state.right.T - u.T @ (v @ state.right.T)
        return replace(state, left=left, right=orthonormal(target.T @ left - v.T @ (u @ left)).T)

    def fit_rows(self, state: State, mode: Mode) -> State:
        """Row factors of the blocks and columns of the low-rank part, jointly, given the column factors."""
        state = replace(state, v=state.v / norms(self.whiten(state.v)))
        spans, net_gain, u, left = self._fit(
            self.whitened_target, state.right, self.whiten(state.v), state.rows, state.cols.widths(), mode
        )
        return replace(state.live(net_gain), u=u, rows=spans, left=orthonormal(left))

    def fit_cols(self, state: State, mode: Mode) -> State:
        """Column factors of the blocks and rows of the low-rank part, jointly, given the row factors."""
        size = norms(state.u)
        state = replace(state, u=state.u / size)
        if self.moment is not None:
            return self._fit_coupled_cols(replace(state, v=state.v * size), mode)
        target = self.whitened_target.T
        spans, net_gain, v, right = self._fit(target, state.left.T, state.u, state.cols, state.rows.widths(), mode)
        return replace(state.live(net_gain), v=v, cols=spans, right=orthonormal(right).T)

    def _choose(self, gains: Tensor, spans: Spans, other: Tensor, mode: Mode, spent: int = 0) -> Choice:
        if mode == BY_GAIN:
            return choose(gains, spans.grid, other, self.min_gain)
        found = choose_within(gains, spans.grid, other, self.min_gain, spent, self.max_multiply_adds)
        self.min_gain = found.min_gain
        return found

    def _fit(
        self, target: Tensor, basis: Tensor, other: Tensor, spans: Spans, other_cost: Tensor, mode: Mode
    ) -> tuple[Spans, Tensor, Tensor, Tensor]:
        """As `_fit_blocks`, but components on the complete axis may join the low-rank part.

        Such components have the same problem at every index, so they are projected out at once; they keep their
        intervals.
        """
        full = spans.cells == spans.grid.cells
        spent = int((spans.widths() + other_cost)[full].sum())
        if self.refit_full or len(basis) or not 0 < spent <= self.max_multiply_adds:
            return self._fit_blocks(target, basis, other, spans, other_cost, mode, 0)
        local = ~full
        basis, corner = torch.linalg.qr(other[full].T)
        chosen, net_gain, factors, rest = self._fit_blocks(
            target, basis.T, other[local], spans.select(local), other_cost[local], mode, spent
        )
        # Put both kinds of components back in their order; those on the complete axis always stay.
        all_net_gain = net_gain.new_full((len(full),), math.inf)
        all_net_gain[local] = net_gain
        live = all_net_gain > 0
        place = torch.arange(int(live.sum()), device=full.device)
        full_at, local_at = place[full[live]], place[local[live]]
        result = factors.new_zeros(len(place), factors.shape[1])
        result[full_at] = torch.linalg.solve_triangular(corner, rest.T, upper=True)
        result[local_at] = factors
        order = torch.argsort(torch.cat([full_at, local_at]))
        return spans.select(full).join(chosen).select(order), all_net_gain, result, rest[:, :0]

    def _fit_blocks(
        self, target: Tensor, basis: Tensor, other: Tensor, spans: Spans, other_cost: Tensor, mode: Mode, spent: int
    ) -> tuple[Spans, Tensor, Tensor, Tensor]:
        """One side of the alternation.

        Args:
            target: (N, M), N being the axis fitted.
            basis: (r, M) orthonormal rows, the fixed side of the low-rank part.
            other: (K, M) fixed factors of the blocks.
            spans: Present intervals on the axis of length N.
            other_cost: (K,) widths on the other side.
            mode: How intervals are chosen.
            spent: Multiply-adds of other components that count against the budget.

        Returns:
            The intervals of the blocks that stay; (K,) net gains, positive for the blocks that stay; the factors of
            these blocks; and the fitted side of the low-rank part, (N, r).
        """
        shared = other @ basis.T
        image = target @ basis.T
        gram = gram_matrix(other).addmm_(shared, shared.T, alpha=-1)
        right = (other @ target.T).addmm_(shared, image.T, alpha=-1)
        net_gain = other.new_ones(len(other))
        if mode != FIXED:
            support = spans.support()
            fitted, inside = supported_solve(gram, right, support, want_gains=True)
            assert inside is not None
            scale = 1 / gram.diagonal().clamp(min=1e-12)
            gains = joint_gains(inside, right, gram @ fitted, support, scale, spans.grid)
            choice = self._choose(gains, spans, other_cost, mode, spent)
            spans, net_gain = choice.spans, choice.net_gain
            live = net_gain > 0
            if not bool(live.all()):
                spans, gram, right = spans.select(live), gram[live][:, live], right[live]
        factors, _ = supported_solve(gram, right, spans.support(), ridge=self._ridge)
        self.explained = float((factors * right).sum() + image.square().sum())
        return spans, net_gain, factors, image - factors.T @ shared[net_gain > 0]

    def _fit_coupled_cols(self, state: State, mode: Mode) -> State:
        """As `_fit_blocks` for columns that couple through the second moment."""
        assert self.moment is not None
        assert self._conditional is not None
        shared = state.u @ state.left
        gram = state.u @ state.u.T - shared @ shared.T
        image = state.u @ self.target - shared @ (state.left.T @ self.target)
        right = image @ self.moment
        support = state.cols.support()
        v = conjugate_gradient(gram, self.moment, right, support, state.v * support, CG_STEPS)
        if mode != FIXED:
            level = gram.diagonal().clamp(min=1e-12)[:, None]
            slope = right - gram @ v @ self.moment
            outside = slope.square() / (level * self.moment.diagonal())
            inside = v.square() * level * self._conditional
            narrow = state.cols.widths() <= WIDE
            if bool(narrow.any()):
                _, gained = supported_solve(self.moment, self.moment @ v[narrow].T, support[narrow].T, want_gains=True)
                assert gained is not None
                inside[narrow] = gained.T * level[narrow]
            gains = cell_sums(torch.where(support, inside, outside), state.cols.grid)
            choice = self._choose(gains, state.cols, state.rows.widths(), mode)
            live = choice.net_gain > 0
            state = replace(replace(state, net_gain=choice.net_gain).select(live), cols=choice.spans.select(live))
            gram, right, v = gram[live][:, live], right[live], v[live]
            support = state.cols.support()
            v = conjugate_gradient(gram, self.moment, right, support, v * support, CG_STEPS)
        state = replace(state, v=v)
        return replace(state, right=orthonormal(self.residual(state).T @ state.left).T)
