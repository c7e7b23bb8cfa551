r"""Combinations of vectors that vanish on long windows of an axis.

What lives on an interval vanishes on the window that is its complement. Whether some combination does is read off the
Gram matrix of the window's rows, which grows with the window: a window that is too long stays too long when it grows,
so that the longest ones are found by bisection or by sliding. No decision rests on an earlier one, which is what lets
single precision through: exact zeros and ranks, decided one index after the other, drown in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .problem import Grid

__all__ = ["by_cells", "cancelled", "longest_cancelled", "shortest_vectors"]

LEVELS = 8
"""Most vectors that are looked for on intervals with a common last cell."""
FLOOR = 1e-7
"""Least size that counts as more than rounding: Gram matrices in float64 hold no smaller ones."""


def by_cells(vectors: Tensor, grid: Grid) -> Tensor:
    """(..., N) values as (..., cells, tile), with zeros past the end of the axis."""
    padded = F.pad(vectors, (0, grid.cells * grid.tile - grid.length))
    cells: Tensor = padded.unflatten(-1, (grid.cells, grid.tile))
    return cells


def shortest_vectors(space: Tensor, grid: Grid, noise: float, least: float) -> tuple[Tensor, Tensor, Tensor]:
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
    present = (size > max(noise, FLOOR) * size.max()).nonzero()[:, 0]
    end = present.repeat_interleave(levels)
    level = torch.arange(levels, device=space.device).repeat(len(present))

    def unspanned(length: Tensor) -> tuple[Tensor, Tensor]:
        """Parts (., d, T) of the ends' rows that windows after them do not span, and their inner products (., T, T)."""
        factor = torch.linalg.cholesky_ex(sums[end + 1 + length] - sums[end + 1] + damping)[0]
        part = ridge * torch.cholesky_solve(rows[end], factor)
        return part, rows[end].transpose(1, 2) @ part

    low, high = torch.full_like(end, -1), torch.full_like(end, count - 1)
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        values = torch.linalg.eigvalsh(unspanned(middle)[1]).flip(1).gather(1, level[:, None])[:, 0]
        independent = values > (least * size[end]) ** 2
        low, high = torch.where(independent, middle, low), torch.where(independent, high, middle - 1)
    part, products = unspanned(low.clamp(min=0))
    vectors = (part @ torch.linalg.eigh(products)[1].flip(2)[:, :, :levels]).transpose(1, 2)  # (., J, d)
    there = (torch.arange(levels, device=space.device) <= level[:, None]) & (low >= 0)[:, None]
    which = there.nonzero()[:, 0]
    return (count - low)[which], ((end + 1 + low) % count)[which], vectors[there]


def longest_cancelled(bases: Tensor, tolerance: float, least: Tensor) -> tuple[Tensor, Tensor]:
    """Longest windows on which the last of some vectors is a combination of the others.

    Args:
        bases: (B, d, C, T) vectors along an axis of C cells; those before the last may be zero (padding).
        tolerance: What is smaller, relative to the last vector's norm, is zero.
        least: (B,) cells of windows that are known already; only longer ones are looked for.

    Returns:
        First cells and numbers of cells, (B,) int64; -1 and ``least`` where no longer window was found.
    """
    batch, dim, count, _ = bases.shape
    index = torch.arange(count, device=bases.device)
    each = torch.arange(batch, device=bases.device)
    known = (bases * (index < least[:, None])[:, None, :, None]).flatten(2)
    gram = known @ known.transpose(1, 2)
    damping = torch.diag(torch.full((dim,), tolerance**2, dtype=bases.dtype, device=bases.device))
    own = torch.linalg.vector_norm(bases[:, -1], dim=(1, 2))
    length, start = least.clone(), torch.full_like(least, -1)
    first = torch.zeros_like(least)

    def cell(at: Tensor) -> Tensor:
        rows = bases[each, :, at % count]
        return rows @ rows.transpose(1, 2)

    while True:
        going = (first < count) & (length < count)
        if not bool(going.any()):
            return start, length
        gram = gram + cell(first + length)
        factor, info = torch.linalg.cholesky_ex(gram + damping)
        # The last pivot is what the others leave of the last vector.
        rest = torch.where(info > 0, torch.zeros_like(own), factor[:, -1, -1])
        longer = (rest <= 2 * tolerance * own) & going
        start, length = torch.where(longer, first, start), length + longer.long()
        gram = gram - cell(first) * (~longer)[:, None, None]
        first = first + (~longer).long()


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
