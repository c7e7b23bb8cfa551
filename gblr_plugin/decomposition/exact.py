"""Writes a matrix as components without any error, if the budget is large enough."""

from __future__ import annotations

import torch
from torch import Tensor

from ..matrix.structure import StructuredMatrix
from ..matrix.tiles import TiledAxis
from .problem import Problem
from .recovery.exchange import Side

__all__ = ["exact", "full_lines", "lines"]


def exact(problem: Problem) -> StructuredMatrix:
    """The weight as one component per row, or per column if there are fewer columns: one index wide, full across."""
    return full_lines(problem.weight, (problem.rows.tile, problem.cols.tile))


def full_lines(weight: Tensor, tiles: tuple[int, int] = (1, 1)) -> StructuredMatrix:
    """A weight as its rows, or as its columns if there are fewer: one factor of a component is a unit vector.

    Args:
        weight: (m, n).
        tiles: Intervals begin and end at multiples of these numbers of rows and columns.
    """
    m, n = weight.shape
    by_rows = m <= n
    grid = TiledAxis(m, tiles[0]) if by_rows else TiledAxis(n, tiles[1])
    count = min(m, n)
    identity = torch.eye(count, dtype=weight.dtype, device=weight.device)
    index = torch.arange(count, dtype=torch.int64, device=identity.device) // grid.tile
    narrow = grid.intervals(torch.ones_like(index), index)
    if by_rows:
        return StructuredMatrix.from_factors(identity, weight.clone(), rows=narrow)
    return StructuredMatrix.from_factors(weight.T.contiguous(), identity, cols=narrow)


def lines(problem: Problem) -> StructuredMatrix | None:
    """The weight as one component per row or column, on the shortest interval that holds that row's non-zero entries.

    For (h, w) blocks of full rank that share no row or no column this takes the fewest multiply-adds: h w + min(h, w).

    Returns:
        The cheaper of both matrices, or ``None`` if both exceed the budget.
    """
    weight = problem.weight
    found = [] if problem.rows.tile > 1 else [_rows(weight, problem.cols, problem)]
    if problem.cols.tile == 1:
        turned = _rows(weight.T, problem.rows, problem)
        if turned is not None:
            turned = StructuredMatrix.from_factors(turned.v, turned.u, turned.cols, turned.rows)
        found.append(turned)
    return min((matrix for matrix in found if matrix is not None), key=lambda matrix: matrix.stored, default=None)


def _rows(weight: Tensor, cols: TiledAxis, problem: Problem) -> StructuredMatrix | None:
    present = weight.any(1).nonzero()[:, 0]
    if not 0 < len(present) <= problem.max_components:
        return None
    if int(weight.count_nonzero()) + len(present) > problem.max_multiply_adds:
        return None
    entries = weight[present]
    spans = Side.of(entries, cols, 0.0).spans()
    if int(spans.widths().sum()) + len(present) > problem.max_multiply_adds:
        return None
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[present]
    narrow = TiledAxis(len(weight), 1).intervals(torch.ones_like(present), present)
    return StructuredMatrix.from_factors(identity, entries.contiguous(), rows=narrow, cols=spans.intervals())
