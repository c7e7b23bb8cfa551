r"""Combinations of vectors that vanish on long windows of an axis.

A vector that lives on an interval vanishes on the window that is the interval's complement. Whether some combination of
vectors vanishes on a window is read off the Gram matrix of the window's rows: it does where that matrix is singular.
The Gram matrix grows with the window, so that combinations found on no window are found on no longer one either, and
the longest windows are found by bisection. Each decision is about all of a window and rests on no earlier decision.
That is what makes it work in single precision: decisions about exact zeros, one index after the other, fail there,
since their rounding errors add up.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ...matrix.tiles import TiledAxis

__all__ = ["WindowSearch", "by_cells", "cancelled", "running_sums", "shortest_vectors"]

LEVELS = 8
"""Most vectors that are looked for on intervals with a common last cell."""
FLOOR = 1e-7
"""Least size that counts as more than rounding: Gram matrices in float64 hold no smaller ones."""
PROBES = 16
"""Starts of windows that are tried first, so that most others need not be."""
CHUNK_ENTRIES = 1 << 21
"""Largest number of Gram entries gathered at once."""
PASSES = 100
"""Passes over a Gram matrix that take as long as its elimination takes multiply-adds per entry."""
STEP = 1 << 20
"""Multiply-adds in the time that a step over next to no data takes."""


def by_cells(vectors: Tensor, grid: TiledAxis) -> Tensor:
    """(..., N) values as (..., cells, tile), no tile being longer than the axis, with zeros past its end."""
    tile = min(grid.tile, grid.length)
    padded = F.pad(vectors, (0, grid.cells * tile - grid.length))
    cells: Tensor = padded.unflatten(-1, (grid.cells, tile))
    return cells


def shortest_vectors(space: Tensor, grid: TiledAxis, noise: float, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell, the shortest intervals that end there and that vectors of a space live on.

    A cell of T indices may end as many independent vectors; the j-th has the longest window after the cell whose rows
    leave j dimensions of the cell's own rows unspanned.

    Args:
        space: (d, N) float64 orthonormal basis of the space along the axis.
        grid: The axis.
        noise: Size of the errors of ``space``.
        least: Part of a row's norm outside the span of a window's rows from which on it is independent of them.

    Returns:
        Cells covered and first cell, (P,) int64, and coefficients (P, d): vectors ``coefficients @ space``, more than
        are independent. A cell on which all vectors vanish ends none.
    """
    count, dim = grid.cells, len(space)
    levels = min(grid.tile, LEVELS, dim)
    rows = by_cells(space, grid).permute(1, 0, 2)  # (C, d, T)
    gram = rows @ rows.transpose(1, 2)
    sums = F.pad(torch.cat([gram, gram]).cumsum(0), (0, 0, 0, 0, 1, 0))
    ridge = max(3 * noise, FLOOR) ** 2
    damping = ridge * torch.eye(dim, dtype=space.dtype, device=space.device)
    size = torch.linalg.vector_norm(rows, dim=1).amax(1)  # (C,)
    if rows.shape[2] > dim:  # only what the rows of a cell span matters
        rows = torch.linalg.qr(rows.transpose(1, 2), mode="r")[1].transpose(1, 2)
    present = (size > max(noise, FLOOR) * size.max()).nonzero()[:, 0]
    end = present.repeat_interleave(levels)
    level = torch.arange(levels, device=space.device).repeat(len(present))

    def unspanned(which: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Parts (., d, T) of ends' rows that windows after them do not span, and their inner products (., T, T)."""
        after, last = end[which] + 1, rows[end[which]]
        factor = torch.linalg.cholesky_ex(sums[after + length] - sums[after] + damping)[0]
        unspanned_rows = ridge * torch.cholesky_solve(last, factor)
        return unspanned_rows, last.transpose(1, 2) @ unspanned_rows

    low, high = torch.full_like(end, -1), torch.full_like(end, count - 1)
    # Where there is no structure, windows are as long as their rows leave anything unspanned: that is tried first.
    usual = (dim - 1 - level) // grid.tile
    guesses = [usual, usual + 1]
    while len(which := (low < high).nonzero()[:, 0]):
        bottom, top = low[which], high[which]
        middle = torch.clamp(guesses.pop()[which], bottom + 1, top) if guesses else (bottom + top + 1) // 2
        values = torch.linalg.eigvalsh(unspanned(which, middle)[1]).flip(1).gather(1, level[which, None])[:, 0]
        independent = values > (least * size[end[which]]) ** 2
        low[which] = torch.where(independent, middle, bottom)
        high[which] = torch.where(independent, top, middle - 1)
    free, products = unspanned(torch.arange(len(end), device=space.device), low.clamp(min=0))
    vectors = (free @ torch.linalg.eigh(products)[1].flip(2)[:, :, :levels]).transpose(1, 2)  # (., J, d)
    there = (torch.arange(levels, device=space.device) <= level[:, None]) & (low >= 0)[:, None]
    which = there.nonzero()[:, 0]
    return (count - low)[which], ((end + 1 + low) % count)[which], vectors[there]


def running_sums(factors: Tensor, grid: TiledAxis) -> Tensor:
    """(C + 1, r, r) Gram matrices of (r, N) factors on the first 0 .. C cells."""
    rows = by_cells(factors, grid).permute(1, 0, 2)
    sums = F.pad(rows @ rows.transpose(1, 2), (0, 0, 0, 0, 1, 0))
    for before, after in pairwise(sums):  # cumsum along the first axis takes ten times as long
        after += before
    return sums


class WindowSearch:
    """Longest windows on which the last of some factors is a combination of the others.

    What is not cancelled on a part of a window is not cancelled on the window. Ranges of starts are halved as long as
    what their windows have in common is cancelled, so that few windows are looked at.

    Args:
        sums: (C + 1, r, r) :func:`running_sums` of factors of norm 1.
        members: (B, d) which of them are combined, the last one in each row being the one that is cancelled.
        there: (B, d) bool, which of the members count.
        tolerance: What is smaller is zero.
        most_work: Multiply-adds (about) after which nothing more is taken for cancelled.
    """

    def __init__(self, sums: Tensor, members: Tensor, there: Tensor, tolerance: float, most_work: int) -> None:
        self.sums, self.members, self.there, self.tolerance = sums, members, there, tolerance
        self.count = len(sums) - 1
        self.work, self.most_work = 0, most_work

    def longest(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """First cells and numbers of cells, (B,) int64, of windows of more than ``least`` cells; -1 and ``least``."""
        start, length = torch.full_like(least, -1), least.clone()
        row = torch.arange(len(least), device=least.device).repeat_interleave(PROBES)
        first = torch.arange(PROBES, device=least.device).repeat(len(least)) * self.count // PROBES
        start, length = self._longest_from(row, first, start, length)
        row = torch.arange(len(least), device=least.device)
        first, size = torch.zeros_like(row), 1 << (self.count - 1).bit_length()
        while True:
            # Windows from ``size`` starts share what the first and the last of them do.
            common = length[row] + 2 - size
            keep = (first < self.count) & (length[row] < self.count)
            tested = (keep & (common > 0)).nonzero()[:, 0]
            keep[tested] = self._vanishes(row[tested], first[tested] + size - 1, common[tested])
            row, first = row[keep], first[keep]
            if size == 1:
                order = torch.argsort(first)
                return self._longest_from(row[order], first[order], start, length)
            size //= 2
            row, first = row.repeat(2), torch.cat([first, first + size])

    def _longest_from(self, row: Tensor, first: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The longest windows, if longer than ``length``, of ``row`` that begin at ``first``."""
        while True:
            longer = length[row] < self.count
            row, first = row[longer], first[longer]
            longer = self._vanishes(row, first, length[row] + 1)
            row, first = row[longer], first[longer]
            if not len(row):
                return start, length
            # One start of each row is followed to the end; the others must be better still.
            chosen, at = torch.unique(row, return_inverse=True)
            index = torch.arange(len(row), device=row.device)
            followed = torch.zeros_like(chosen).scatter_reduce(0, at, index, "amin", include_self=False)
            low, high = length[chosen] + 1, torch.full_like(chosen, self.count)
            while bool((low < high).any()):
                middle = (low + high + 1) // 2
                longer = self._vanishes(chosen, first[followed], middle)
                low, high = torch.where(longer, middle, low), torch.where(longer, high, middle - 1)
            start, length = start.index_copy(0, chosen, first[followed]), length.index_copy(0, chosen, low)

    def _vanishes(self, row: Tensor, begin: Tensor, length: Tensor) -> Tensor:
        """Whether the last member of ``row`` is cancelled on windows of ``length`` cells from cell ``begin`` on."""
        size = self.members.shape[1]
        self.work += STEP + len(row) * size**2 * (size + PASSES)
        if self.work > self.most_work:
            return torch.zeros_like(row, dtype=torch.bool)
        pieces = [each.split(max(1, CHUNK_ENTRIES // size**2)) for each in (row, begin % self.count, length)]
        return torch.cat([self._vanish(*piece) for piece in zip(*pieces, strict=True)])

    def _vanish(self, row: Tensor, begin: Tensor, length: Tensor) -> Tensor:
        members, there = self.members[row], self.there[row]
        end = begin + length
        wraps = end > self.count
        pairs = members[:, :, None] * self.sums.shape[1] + members[:, None]

        def upto(cell: Tensor) -> Tensor:
            return self.sums.take(pairs + cell[:, None, None] * self.sums[0].numel())

        gram = upto(torch.where(wraps, end - self.count, end)) - upto(begin)
        gram[wraps] += self.sums[-1].take(pairs[wraps])
        gram *= there[:, :, None] & there[:, None]
        gram.diagonal(dim1=1, dim2=2).add_(self.tolerance**2)
        factor, info = torch.linalg.cholesky_ex(gram)
        # The last pivot is what the others leave of the last factor.
        vanish: Tensor = (info > 0) | (factor[:, -1, -1] <= 2 * self.tolerance)
        return vanish


def cancelled(bases: Tensor, tolerance: float, start: Tensor, length: Tensor) -> Tensor:
    """Coefficients (B, d - 1) of the others with which the last vector vanishes on windows of ``length`` cells."""
    index = torch.arange(bases.shape[2], device=bases.device)
    inside = (index - start[:, None]) % bases.shape[2] < length[:, None]
    window = (bases * inside[:, None, :, None]).flatten(2)
    others, last = window[:, :-1], window[:, -1:]
    gram = others @ others.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(tolerance**2)
    solution: Tensor = torch.linalg.solve(gram, (others @ last.transpose(1, 2))[:, :, 0])
    return -solution
