r"""Finds combinations of vectors that are zero on long windows of an axis, for exact recovery.

A vector that is zero off an interval vanishes on a window: the interval's complement. Some combination of given vectors
vanishes on a window if the Gram matrix of the window's rows (the vectors' entries there) is singular. If none vanishes
on a window, none vanishes on a larger window around it, so bisection finds the longest windows.

Each test looks at a complete window and depends on no earlier test, so that it works on weights in single precision.
An elimination that decides index by index which entries are zero fails on these, since its rounding errors add up.
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
    """(..., N) values as (..., cells, tile), with zeros after the end of the axis; a cell is one tile of the axis."""
    tile = min(grid.tile, grid.length)
    padded = F.pad(vectors, (0, grid.cells * tile - grid.length))
    cells: Tensor = padded.unflatten(-1, (grid.cells, tile))
    return cells


def shortest_vectors(space: Tensor, grid: TiledAxis, noise: float, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell, the vectors of a space that are zero off the shortest intervals ending at that cell.

    Up to T independent vectors may end at a cell of T indices. The j-th of them vanishes on the longest window after
    the cell whose rows leave j dimensions of the cell's rows outside their span.

    Args:
        space: (d, N) float64 orthonormal basis of the space along the axis.
        grid: The axis.
        noise: Size of the errors of ``space``.
        least: A row is independent of a window's rows if more than this share of its norm is outside their span.

    Returns:
        Number of cells and first cell of each interval, (P,) int64, and coefficients (P, d). The P vectors
        ``coefficients @ space`` are not independent of each other. None ends at a cell on which the space is zero.
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
        """(., d, T) parts of the last cells' rows outside the span of the windows' rows; (., T, T) inner products."""
        after, last = end[which] + 1, rows[end[which]]
        factor = torch.linalg.cholesky_ex(sums[after + length] - sums[after] + damping)[0]
        unspanned_rows = ridge * torch.cholesky_solve(last, factor)
        return unspanned_rows, last.transpose(1, 2) @ unspanned_rows

    low, high = torch.full_like(end, -1), torch.full_like(end, count - 1)
    # First try the length for a space without structure, whose windows end when their rows span everything.
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
    """Finds the longest windows on which some factors can cancel another one: it is a combination of them there.

    A factor that cannot be cancelled on a section of a window cannot be cancelled on the window. So a range of starts
    is halved only if the factor can be cancelled on the section that all its windows share: few windows are tested.

    Args:
        sums: (C + 1, r, r) :func:`running_sums` of factors of norm 1.
        members: (B, d) indices of the factors in each of B searches; the last factor is the one to cancel.
        there: (B, d) bool, which of the members count.
        tolerance: Entries below it count as zero.
        most_work: Multiply-adds (about) after which every further test answers that nothing is cancelled.
    """

    def __init__(self, sums: Tensor, members: Tensor, there: Tensor, tolerance: float, most_work: int) -> None:
        self.sums, self.members, self.there, self.tolerance = sums, members, there, tolerance
        self.count = len(sums) - 1
        self.work, self.most_work = 0, most_work

    def longest(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """First cell and cells, (B,) int64, of each search's longest window; -1 and ``least`` if none is longer."""
        start, length = torch.full_like(least, -1), least.clone()
        row = torch.arange(len(least), device=least.device).repeat_interleave(PROBES)
        first = torch.arange(PROBES, device=least.device).repeat(len(least)) * self.count // PROBES
        start, length = self._longest_from(row, first, start, length)
        row = torch.arange(len(least), device=least.device)
        first, size = torch.zeros_like(row), 1 << (self.count - 1).bit_length()
        while True:
            # The windows of ``size`` successive starts share the section that the first and the last window share.
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
        """``start`` and ``length``, improved where a window of search ``row`` that begins at ``first`` is longer."""
        while True:
            longer = length[row] < self.count
            row, first = row[longer], first[longer]
            longer = self._vanishes(row, first, length[row] + 1)
            row, first = row[longer], first[longer]
            if not len(row):
                return start, length
            # The full length from one start of each search is found; the other starts must then exceed it.
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
        """Whether the last factor of search ``row`` can be cancelled on the ``length`` cells from ``begin`` on."""
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
        # The last pivot is the norm of what remains of the last factor after projection on the others.
        vanish: Tensor = (info > 0) | (factor[:, -1, -1] <= 2 * self.tolerance)
        return vanish


def cancelled(bases: Tensor, tolerance: float, start: Tensor, length: Tensor) -> Tensor:
    """(B, d - 1) coefficients by which the others, added to the last vector, cancel it on ``length`` cells."""
    index = torch.arange(bases.shape[2], device=bases.device)
    inside = (index - start[:, None]) % bases.shape[2] < length[:, None]
    window = (bases * inside[:, None, :, None]).flatten(2)
    others, last = window[:, :-1], window[:, -1:]
    gram = others @ others.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(tolerance**2)
    solution: Tensor = torch.linalg.solve(gram, (others @ last.transpose(1, 2))[:, :, 0])
    return -solution
