r"""Shorter intervals for a product of factors: adding one component's factor to another's leaves the product alone.

u_l += c u_k with v_k -= c v_l changes no product U^T V. Where u_l can so be made to vanish on a longer window, its
interval gets shorter, while those of the v_k grow as far as they do not hold that of v_l. What the first gains less
what the others lose is exact, in multiply-adds; exchanges are made while one pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...matrix.tiles import TiledAxis
from ..spans import Spans, longest_run
from .vanishing import WindowSearch, by_cells, cancelled, running_sums

__all__ = ["Exchange", "Side"]

GROWTH = (0, 1, 2, 4)
"""By how many cells an interval may grow for the sake of the other side's."""
ROUNDS = 60
"""More have not been seen to be needed."""
SUMS = 16
"""Multiply-adds in the time that an entry of running sums takes."""


@dataclass(eq=False)
class Side:
    """Factors of all components along one axis, (r, N), and the cells that they live on, (r,) int64 each."""

    factors: Tensor
    cells: Tensor
    start: Tensor
    grid: TiledAxis

    @classmethod
    def of(cls, factors: Tensor, grid: TiledAxis, tolerance: float) -> Side:
        """Spans that hold the entries above the tolerance, relative to a factor's largest."""
        size = by_cells(factors.abs(), grid).amax(2)
        gap, first = longest_run(size <= tolerance * size.amax(1, keepdim=True))
        return cls(factors, grid.cells - gap, (first + gap) % grid.cells, grid)

    def spans(self) -> Spans:
        """The intervals; one that wraps where the grid does not let it is the whole axis."""
        whole = (self.cells >= self.grid.cells) | ((self.start + self.cells > self.grid.cells) & (not self.grid.cyclic))
        return Spans(torch.where(whole, self.grid.cells, self.cells), torch.where(whole, 0, self.start), self.grid)

    def growth(self) -> Tensor:
        """(r, r) int64: by how many cells interval k grows to hold interval l as well."""
        count = self.grid.cells
        from_own = torch.maximum(self.cells[:, None], (self.start[None] - self.start[:, None]) % count + self.cells)
        from_other = torch.maximum(
            self.cells[None], (self.start[:, None] - self.start[None]) % count + self.cells[:, None]
        )
        return torch.minimum(from_own, from_other).clamp(max=count) - self.cells[:, None]

    def hold(self, one: int, other: int) -> None:
        """Let interval ``one`` hold ``other`` as well."""
        count = self.grid.cells
        cells, start = self.cells.tolist(), self.start.tolist()
        from_own = max(cells[one], (start[other] - start[one]) % count + cells[other])
        from_other = max(cells[other], (start[one] - start[other]) % count + cells[one])
        if from_other < from_own:
            self.start[one] = start[other]
        self.cells[one] = min(from_own, from_other, count)


class Exchange:
    """Exchanges between the components of ``rows.factors.T @ cols.factors``.

    Args:
        rows: Row factors (r, m); their intervals are found here.
        cols: Column factors (r, n) on their intervals.
        target: (m, n) the product.
        row_grid: Axis of the rows.
        tolerance: What is smaller, relative to a factor, is zero.
        most_work: Work, in multiply-adds (about), beyond which no further step is taken.
    """

    def __init__(
        self, rows: Tensor, cols: Side, target: Tensor, row_grid: TiledAxis, tolerance: float, most_work: int
    ) -> None:
        self.target, self.tolerance, self.most_work = target, tolerance, most_work
        self.work = 0
        self.sums: dict[int, Tensor] = {}  # of either side, as long as its factors stay
        self.cols = cols
        self.rows = self._nested(rows, row_grid)

    def cost(self) -> int:
        """Multiply-adds."""
        return int(self.rows.spans().widths().sum() + self.cols.spans().widths().sum())

    def _longest(
        self, factors: Tensor, sums: Tensor, may: Tensor, last: Tensor, grid: TiledAxis, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Longest windows on which factors vanish once they have taken up others.

        Args:
            factors: (r, N) of norm 1.
            sums: Their running sums.
            may: (r, B) bool, who may be taken up.
            last: (B,) components that take up others.
            grid: The axis.
            least: (B,) cells of windows that are known.

        Returns:
            First cell and number of cells, -1 and ``least`` where none is longer; (B, d) who the candidates were and
            what share of them is taken up.
        """
        count = may.sum(0)
        most = int(count.max())
        who = torch.argsort(may.long(), dim=0, descending=True, stable=True)[:most].T
        there = torch.arange(most + 1, device=may.device) < count[:, None]
        there[:, -1] = True
        members = torch.cat([who, last[:, None]], 1)
        search = WindowSearch(sums, members, there, self.tolerance, self.most_work - self.work)
        start, length = search.longest(least)
        self.work += search.work
        shares, hit = factors.new_zeros(who.shape), start >= 0
        if bool(hit.any()):
            bases = by_cells(factors[members[hit]] * there[hit][:, :, None], grid)
            shares[hit] = cancelled(bases, self.tolerance, start[hit], length[hit]) * there[hit, :-1]
        return start, length, who, shares

    def _nested(self, factors: Tensor, grid: TiledAxis) -> Side:
        """All row factors made short at once by those whose columns hold theirs, which costs no column anything."""
        rank = len(factors)
        index = torch.arange(rank, device=factors.device)
        may = self.cols.growth() <= 0
        may &= ~(may & may.T & (index[:, None] <= index))  # an order: what is mixed can be unmixed
        size = torch.linalg.vector_norm(factors, dim=1, keepdim=True).clamp(min=1e-300)
        if bool(may.any()):
            unit = factors / size
            self.work += SUMS * unit.shape[1] * rank**2
            _, _, who, shares = self._longest(unit, running_sums(unit, grid), may, index, grid, torch.zeros_like(index))
            shares = shares * size / size[who][:, :, 0]
            mix = torch.eye(rank, dtype=factors.dtype, device=factors.device).scatter_add_(1, who, shares)
            self.cols.factors = torch.linalg.solve(mix.T, self.cols.factors) * self.cols.spans().support()
            factors = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
        return Side.of(factors, grid, self.tolerance)

    def run(self) -> None:
        """Exchange until nothing pays any more, or the work allowed is done."""
        sides = (self.rows, self.cols)
        everyone = torch.ones(len(self.rows.cells), dtype=torch.bool, device=self.target.device)
        pending = {(growth, turn): everyone for growth in GROWTH for turn in (0, 1)}
        for _ in range(ROUNDS):
            gained = 0
            for growth in GROWTH:
                for turn in (0, 1):
                    one, other = sides[turn], sides[1 - turn]
                    changed = pending[growth, turn]
                    pending[growth, turn] = torch.zeros_like(everyone)
                    gain, touched = self._exchange(one, other, growth, changed)
                    gained += gain
                    if gain:
                        self.sums.clear()
                    pending = {key: before | touched for key, before in pending.items()}
                if gained:
                    break
            if not gained:
                return
            # Errors of exchanges do not add up: rows follow from columns.
            self.cols.factors = self.cols.factors * self.cols.spans().support()
            fitted = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
            self.rows.factors = fitted * self.rows.spans().support()
            self.sums.clear()

    def _exchange(self, one: Side, other: Side, growth: int, changed: Tensor) -> tuple[int, Tensor]:
        """Exchanges that shorten intervals of ``one`` and let those of ``other`` grow by up to ``growth`` cells.

        Only those that meet a component in ``changed`` (r,) are tried. Returns what was gained and who took part.
        """
        owned, taken = torch.zeros_like(changed), torch.zeros_like(changed)
        grows = other.growth()
        may = (grows <= growth).fill_diagonal_(False)
        last = ((may & changed[:, None]).any(0) | (changed & may.any(0))).nonzero()[:, 0]
        if not len(last) or self.work > self.most_work:
            return 0, owned
        size = torch.linalg.vector_norm(one.factors, dim=1, keepdim=True).clamp(min=1e-300)
        unit = one.factors / size
        if id(one) not in self.sums:
            self.sums[id(one)] = running_sums(unit, one.grid)
            self.work += SUMS * unit.shape[1] * len(unit) ** 2
        start, length, who, shares = self._longest(
            unit, self.sums[id(one)], may[:, last], last, one.grid, one.grid.cells - one.cells[last]
        )
        hit = start >= 0
        if not bool(hit.any()):
            return 0, owned
        last, who, shares, start, length = last[hit], who[hit], shares[hit], start[hit], length[hit]
        used = shares.abs() > 10 * self.tolerance
        cells, begin = one.grid.cells - length, (start + length) % one.grid.cells
        lost = (grows[who, last[:, None]] * used).sum(1) * other.grid.tile
        gains = (one.cells[last] - cells) * one.grid.tile - lost
        total = 0
        inside = Spans(cells, begin, one.grid).support()
        for position in torch.argsort(gains, descending=True, stable=True).tolist():
            if gains[position] <= 0:
                break
            own, takes = int(last[position]), who[position][used[position]]
            if taken[own] or bool(owned[takes].any()):
                continue  # factors that were counted on have changed
            share = shares[position][used[position]] * size[own, 0] / size[takes, 0]
            one.factors[own] = (one.factors[own] + share @ one.factors[takes]) * inside[position]
            one.cells[own], one.start[own] = cells[position], begin[position]
            other.factors[takes] -= share[:, None] * other.factors[own]
            for holder in takes.tolist():
                other.hold(holder, own)
            owned[own] = True
            taken[takes] = True
            total += int(gains[position])
        return total, owned | taken
