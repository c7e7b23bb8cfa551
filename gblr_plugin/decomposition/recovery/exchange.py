r"""Exchanges between components, which make their intervals shorter in total and leave the product U^T V unchanged.

``u_l += sum_k c_k u_k`` with ``v_k -= c_k v_l`` for each k does not change U^T V. If coefficients c exist with which
u_l vanishes on a longer window, the interval of u_l gets shorter, and the interval of each v_k grows until it holds
that of v_l. The multiply-adds that an exchange saves are thus known exactly before it is made. Exchanges are made until
none saves any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...matrix.tiles import TiledAxis
from ..spans import Spans, longest_run
from .vanishing import WindowSearch, by_cells, cancelled, running_sums

__all__ = ["Exchange", "Side"]

GROWTH = (0, 4)
"""By how many cells the intervals of one side may grow in an exchange that shortens one of the other side."""
ROUNDS = 60
"""Most rounds of exchanges; no matrix tried has needed more."""


@dataclass(eq=False)
class Side:
    """Factors of all components along one axis, and the cells on which they are not zero.

    Args:
        factors: (r, N).
        cells: (r,) int64 number of cells.
        start: (r,) int64 first cell.
        grid: The axis of length N.
    """

    factors: Tensor
    cells: Tensor
    start: Tensor
    grid: TiledAxis

    @classmethod
    def of(cls, factors: Tensor, grid: TiledAxis, tolerance: float) -> Side:
        """Factors on the shortest intervals that hold their entries above ``tolerance`` times the largest entry."""
        size = by_cells(factors.abs(), grid).amax(2)
        gap, first = longest_run(size <= tolerance * size.amax(1, keepdim=True))
        return cls(factors, grid.cells - gap, (first + gap) % grid.cells, grid)

    def spans(self) -> Spans:
        """The intervals; an interval that wraps on an axis that is not cyclic becomes the complete axis."""
        beyond = (self.start + self.cells > self.grid.cells) & (not self.grid.cyclic)
        full = (self.cells >= self.grid.cells) | beyond
        return Spans(torch.where(full, self.grid.cells, self.cells), torch.where(full, 0, self.start), self.grid)

    def _around(self, k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  # as in the equations above
        """Number of cells of the interval that begins where k begins and holds both k and l."""
        return torch.maximum(self.cells[k], (self.start[l] - self.start[k]) % self.grid.cells + self.cells[l])

    def growth(self) -> Tensor:
        """(r, r) int64: by how many cells interval k grows to hold interval l as well."""
        index = torch.arange(len(self.cells), device=self.cells.device)
        around = self._around(index[:, None], index[None])
        return torch.minimum(around, around.T).clamp(max=self.grid.cells) - self.cells[:, None]

    def hold(self, k: int, l: int) -> None:  # noqa: E741  # as in the equations above
        """Extend interval k until it holds interval l as well."""
        first, second = torch.tensor(k), torch.tensor(l)
        from_k, from_l = int(self._around(first, second)), int(self._around(second, first))
        if from_l < from_k:
            self.start[k] = self.start[l]
        self.cells[k] = min(from_k, from_l, self.grid.cells)


class Exchange:
    """Exchanges between the components of ``rows.factors.T @ cols.factors``.

    Args:
        rows: Row factors (r, m); the constructor finds their intervals.
        cols: Column factors (r, n) on their intervals.
        target: (m, n) the product.
        row_grid: Axis of the rows.
        tolerance: Size below which entries count as zero, relative to their factor.
        most_work: Multiply-adds (about) after which the search for exchanges ends.

    Attributes:
        work: Multiply-adds (about) of the search so far.
    """

    def __init__(
        self, rows: Tensor, cols: Side, target: Tensor, row_grid: TiledAxis, tolerance: float, most_work: int
    ) -> None:
        self.target, self.tolerance, self.most_work = target, tolerance, most_work
        self.work = 0
        self.cols = cols
        self.rows = self._nested(rows, row_grid)

    def cost(self) -> int:
        """Multiply-adds of all components on their present intervals."""
        return int(self.rows.spans().widths().sum() + self.cols.spans().widths().sum())

    def run(self) -> None:
        """Make exchanges until none saves multiply-adds, or the search exceeds ``most_work``."""
        for _ in range(ROUNDS):
            for growth in GROWTH:
                saved = self._exchange(self.rows, self.cols, growth) + self._exchange(self.cols, self.rows, growth)
                if saved:
                    break
            else:
                return
            # Fit the rows to the columns anew, so that the errors of exchanges do not add up.
            self.cols.factors = self.cols.factors * self.cols.spans().support()
            fitted = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
            self.rows.factors = fitted * self.rows.spans().support()

    def _nested(self, factors: Tensor, grid: TiledAxis) -> Side:
        """Row factors on short intervals, by all exchanges at once in which no column interval has to grow."""
        rank = len(factors)
        index = torch.arange(rank, device=factors.device)
        may = self.cols.growth() <= 0
        may &= ~(may & may.T & (index[:, None] <= index))  # of two equal intervals one may: the mixture is invertible
        if bool(may.any()):
            size = _norms(factors)
            _, _, members, shares = self._longest(factors / size, may, index, grid, torch.zeros_like(index))
            shares = shares * size / size[members][:, :, 0]
            mix = torch.eye(rank, dtype=factors.dtype, device=factors.device).scatter_add_(1, members, shares)
            self.cols.factors = torch.linalg.solve(mix.T, self.cols.factors) * self.cols.spans().support()
            factors = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
        return Side.of(factors, grid, self.tolerance)

    def _longest(
        self, factors: Tensor, may: Tensor, takers: Tensor, grid: TiledAxis, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each taker, the longest window on which it vanishes once multiples of other factors are added to it.

        Args:
            factors: (r, N) of norm 1.
            may: (r, B) bool, which factor may be added to which taker.
            takers: (B,) indices of the factors to which others are added.
            grid: The axis.
            least: (B,) cells of the windows on which the takers vanish already.

        Returns:
            First cell and number of cells of each window, -1 and ``least`` where none is longer; (B, d) indices of the
            factors that may be added, and (B, d) their coefficients.
        """
        count = may.sum(0)
        most = int(count.max())
        members = torch.argsort(may.long(), dim=0, descending=True, stable=True)[:most].T
        there = torch.arange(most + 1, device=may.device) < count[:, None]
        there[:, -1] = True
        with_taker = torch.cat([members, takers[:, None]], 1)
        sums = running_sums(factors, grid)
        search = WindowSearch(sums, with_taker, there, self.tolerance, self.most_work - self.work)
        start, length = search.longest(least)
        self.work += search.work
        shares, hit = factors.new_zeros(members.shape), start >= 0
        if bool(hit.any()):
            bases = by_cells(factors[with_taker[hit]] * there[hit][:, :, None], grid)
            shares[hit] = cancelled(bases, self.tolerance, start[hit], length[hit]) * there[hit, :-1]
        return start, length, members, shares

    def _exchange(self, shrinking: Side, growing: Side, growth: int) -> int:
        """Shorten intervals of ``shrinking`` while those of ``growing`` grow by at most ``growth`` cells each.

        Returns:
            Multiply-adds saved.
        """
        grows = growing.growth()
        may = (grows <= growth).fill_diagonal_(False)
        takers = may.any(0).nonzero()[:, 0]
        if not len(takers) or self.work > self.most_work:
            return 0
        grid, size = shrinking.grid, _norms(shrinking.factors)
        known = grid.cells - shrinking.cells[takers]
        start, length, members, shares = self._longest(shrinking.factors / size, may[:, takers], takers, grid, known)
        hit = start >= 0
        takers, members, shares, start, length = takers[hit], members[hit], shares[hit], start[hit], length[hit]
        used = shares.abs() > 10 * self.tolerance
        cells, begin = grid.cells - length, (start + length) % grid.cells
        cost = (grows[members, takers[:, None]] * used).sum(1) * growing.grid.tile
        savings = (shrinking.cells[takers] - cells) * grid.tile - cost
        inside = Spans(cells, begin, grid).support()
        total = 0
        shrunk, grown = torch.zeros(2, len(may), dtype=torch.bool, device=may.device)
        for at in torch.argsort(savings, descending=True, stable=True).tolist():
            if savings[at] <= 0:
                break
            taker, added = int(takers[at]), members[at][used[at]]
            if grown[taker] or bool(shrunk[added].any()):
                continue  # an exchange before has changed factors from which this saving was computed
            share = shares[at][used[at]] * size[taker, 0] / size[added, 0]
            shrinking.factors[taker] = (shrinking.factors[taker] + share @ shrinking.factors[added]) * inside[at]
            shrinking.cells[taker], shrinking.start[taker] = cells[at], begin[at]
            growing.factors[added] -= share[:, None] * growing.factors[taker]
            for holder in added.tolist():
                growing.hold(holder, taker)
            shrunk[taker] = True
            grown[added] = True
            total += int(savings[at])
        return total


def _norms(factors: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(factors, dim=1, keepdim=True)
    return found.clamp(min=1e-300)
