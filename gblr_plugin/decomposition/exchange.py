r"""Shorter intervals for a product of factors: adding one component's factor to another's leaves the product alone.

u_l += c u_k with v_k -= c v_l changes no product U^T V. Where u_l can so be made to vanish on a longer window, its
interval gets shorter, while those of the v_k grow as far as they do not hold that of v_l. What the first gains less
what the others lose is exact, in multiply-adds; exchanges are made while one pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interval_finder import longest_run
from .problem import Grid
from .spans import Spans
from .vanishing import by_cells, cancelled, longest_cancelled

__all__ = ["Exchange", "Side"]

GROWTH = (0, 1, 2, 4)
"""By how many cells an interval may grow for the sake of the other side's."""
ROUNDS = 60
"""More have not been seen to be needed."""


@dataclass
class Side:
    """Factors of all components along one axis, (r, N), and the cells that they live on, (r,) int64 each."""

    factors: Tensor
    cells: Tensor
    start: Tensor
    grid: Grid

    @classmethod
    def of(cls, factors: Tensor, grid: Grid, tolerance: float) -> Side:
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
        tolerance: What is smaller, relative to a factor, is zero.
    """

    def __init__(self, rows: Tensor, cols: Side, target: Tensor, row_grid: Grid, tolerance: float) -> None:
        self.target, self.tolerance = target, tolerance
        self.work = 0
        self.cols = cols
        self.rows = self._nested(rows, row_grid)

    def cost(self) -> int:
        """Multiply-adds."""
        return int(self.rows.spans().widths().sum() + self.cols.spans().widths().sum())

    def _bases(self, factors: Tensor, may: Tensor, last: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors that components ``last`` (B,) may take up, then their own.

        Args:
            factors: (r, N) of norm 1.
            may: (r, B) bool, who may be taken up.
            last: Components that take up others.
            grid: The axis.

        Returns:
            (B, d + 1, C, T) vectors, and (B, d) who the first d are and which are there at all.
        """
        count = may.sum(0)
        most = int(count.max())
        who = torch.argsort(may.long(), dim=0, descending=True, stable=True)[:most].T
        there = torch.arange(most, device=may.device) < count[:, None]
        self.work += len(last) * grid.cells * (most + 1) ** 3
        others = factors[who] * there[:, :, None]
        return by_cells(torch.cat([others, factors[last][:, None]], 1), grid), who, there

    def _nested(self, factors: Tensor, grid: Grid) -> Side:
        """All row factors made short at once by those whose columns hold theirs, which costs no column anything."""
        rank = len(factors)
        index = torch.arange(rank, device=factors.device)
        may = self.cols.growth() <= 0
        may &= ~(may & may.T & (index[:, None] <= index))  # an order: what is mixed can be unmixed
        size = torch.linalg.vector_norm(factors, dim=1, keepdim=True)
        if bool(may.any()):
            bases, who, there = self._bases(factors / size, may, index, grid)
            found = longest_cancelled(bases, self.tolerance, torch.zeros_like(index))
            shares = cancelled(bases, self.tolerance, *found) * there * size / size[who][:, :, 0]
            mix = torch.eye(rank, dtype=factors.dtype, device=factors.device).scatter_add_(1, who, shares)
            self.cols.factors = torch.linalg.solve(mix.T, self.cols.factors) * self.cols.spans().support()
            factors = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
        return Side.of(factors, grid, self.tolerance)

    def run(self, most_work: int) -> None:
        """Exchange until nothing pays any more, or until ``most_work`` multiply-adds (about) are done."""
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
                    pending = {key: before | touched for key, before in pending.items()}
                if gained:
                    break
            if not gained or self.work > most_work:
                return
            # Errors of exchanges do not add up: rows follow from columns.
            self.cols.factors = self.cols.factors * self.cols.spans().support()
            fitted = torch.linalg.lstsq(self.cols.factors.T, self.target.T).solution
            self.rows.factors = fitted * self.rows.spans().support()

    def _exchange(self, one: Side, other: Side, growth: int, changed: Tensor) -> tuple[int, Tensor]:
        """Exchanges that shorten intervals of ``one`` and let those of ``other`` grow by up to ``growth`` cells.

        Only those that meet a component in ``changed`` (r,) are tried. Returns what was gained and who took part.
        """
        owned, taken = torch.zeros_like(changed), torch.zeros_like(changed)
        grows = other.growth()
        may = (grows <= growth).fill_diagonal_(False)
        last = ((may & changed[:, None]).any(0) | (changed & may.any(0))).nonzero()[:, 0]
        if not len(last):
            return 0, owned
        size = torch.linalg.vector_norm(one.factors, dim=1, keepdim=True).clamp(min=1e-300)
        bases, who, there = self._bases(one.factors / size, may[:, last], last, one.grid)
        start, length = longest_cancelled(bases, self.tolerance, one.grid.cells - one.cells[last])
        hit = start >= 0
        if not bool(hit.any()):
            return 0, owned
        last, who, there, start, length = last[hit], who[hit], there[hit], start[hit], length[hit]
        shares = cancelled(bases[hit], self.tolerance, start, length)
        used = (shares.abs() > 10 * self.tolerance) & there
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
