"""Converts a low-rank product between the trapezoid form, which costs least, and the low-rank form, which trains best.

A product A C of rank r equals (A R) (R^-1 C) for any invertible R. The r^2 numbers of R can make A lower and C upper
trapezoidal (component k on the rows and columns from k), which takes r (r - 1) multiply-adds less; see
:mod:`gblr_plugin.matrix.trapezoid_form`. Optimizers train trapezoids badly, since the pivots of that elimination make
their factors badly conditioned. The factors of the low-rank form have balanced norms and are as well conditioned as
those of an SVD. A layer therefore trains such a product in low-rank form, and is counted and converted in trapezoid
form.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .structure import Intervals
from .svd import truncated_svd
from .tiles import TiledAxis
from .trapezoid_form import trapezoid_form

__all__ = ["to_low_rank_form", "to_trapezoid_form"]

_logger = logging.getLogger(__name__)


def _leading_trapezoids(rows: Intervals, cols: Intervals, tiles: tuple[int, int]) -> int:
    """How many of the first components are trapezoids: each interval begins one tile after the one before."""
    most = min(rows.num_components, rows.length, cols.length)
    same = torch.ones(most, dtype=torch.bool, device=rows.width.device)
    for side, tile in zip((rows, cols), tiles, strict=True):
        straight = TiledAxis(side.length, tile).trailing(most, rows.width.device)
        same &= (side.width[:most] == straight.width) & (straight.width > 0)
        # A full interval starts anywhere; the others begin where the trapezoids do, turned by one offset.
        partial = straight.width < side.length
        turn = (side.start[:most] - straight.start) % side.length
        if bool(partial.any()):
            same &= ~partial | (turn == turn[int(partial.int().argmax())])
    rank = int(same.int().cummin(0).values.sum())
    return rank if rank > 1 else 0


@torch.no_grad()
def to_low_rank_form(
    u: Tensor, v: Tensor, rows: Intervals, cols: Intervals, sizes: Sequence[int], tiles: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace leading trapezoids of each split by full factors of balanced norm with the same product.

    Args:
        u: (K, m / s) row factors.
        v: (K, n) column factors.
        rows: Row intervals.
        cols: Column intervals.
        sizes: Components of each split.
        tiles: Rows and columns to multiples of which intervals snap.

    Returns:
        u, v, and (K,) bool of the components replaced.
    """
    u, v = u.detach().clone(), v.detach().clone()
    free = torch.zeros(u.shape[0], dtype=torch.bool, device=u.device)
    first = 0
    for size in sizes:
        index = torch.arange(first, first + size, device=u.device)
        rank = _leading_trapezoids(rows.select(index), cols.select(index), tiles)
        first += size
        if rank < 2:
            continue
        index = index[:rank]
        left = u[index].double() * rows.select(index).support()
        right = v[index].double() * cols.select(index).support()
        # SVD of the product by way of its two thin factors.
        q_left, r_left = torch.linalg.qr(left.T)
        q_right, r_right = torch.linalg.qr(right.T)
        a, c = truncated_svd(r_left @ r_right.T, rank)
        u[index] = (q_left @ a).T.to(u.dtype)
        v[index] = (c @ q_right.T).to(v.dtype)
        free[index] = True
    return u, v, free


@torch.no_grad()
def to_trapezoid_form(
    u: Tensor,
    v: Tensor,
    rows: Intervals,
    cols: Intervals,
    free: Tensor,
    sizes: Sequence[int],
    tiles: tuple[int, int],
) -> tuple[Tensor, Tensor, Intervals, Intervals]:
    """Inverse of :func:`to_low_rank_form`: the full factors of each split as trapezoids.

    If no order of elimination is stable, the best low-rank approximation in low-rank form at the same cost replaces the
    product, with a warning.

    Args:
        u: (K, m / s) row factors.
        v: (K, n) column factors.
        rows: Row intervals, those of trapezoids for the components in ``free``.
        cols: Column intervals, likewise.
        free: (K,) bool.
        sizes: Components of each split.
        tiles: As for :func:`to_low_rank_form`.

    Returns:
        u, v, row and column intervals; trapezoids may begin at other columns than before, at the same cost.
    """
    u, v = u.detach().clone(), v.detach().clone()
    widths = [rows.width.clone(), cols.width.clone()]
    starts = [rows.start.clone(), cols.start.clone()]
    first = 0
    for size in sizes:
        index = torch.arange(first, first + size, device=u.device)
        index = index[free[index]]
        first += size
        if not len(index):
            continue
        left, right = u[index].double().T, v[index].double()
        found = trapezoid_form(left, right, TiledAxis(rows.length, tiles[0]), TiledAxis(cols.length, tiles[1]))
        if found is not None:
            u[index], v[index] = found.u.to(u.dtype), found.v.to(v.dtype)
            for side, intervals in enumerate((found.rows, found.cols)):
                widths[side][index], starts[side][index] = intervals.width, intervals.start
            continue
        cost = int((rows.width[index] + cols.width[index]).sum())
        kept = cost // (rows.length + cols.length)
        _logger.warning("no stable trapezoids for a low-rank product of rank %d: kept rank %d", len(index), kept)
        a, c = truncated_svd(left @ right, kept)
        u[index] = F.pad(a.T, (0, 0, 0, len(index) - kept)).to(u.dtype)
        v[index] = F.pad(c, (0, 0, 0, len(index) - kept)).to(v.dtype)
        for side, length in enumerate((rows.length, cols.length)):
            is_kept = torch.arange(len(index), device=u.device) < kept
            widths[side][index], starts[side][index] = torch.where(is_kept, length, 0), torch.zeros_like(index)
    return u, v, Intervals(widths[0], starts[0], rows.length), Intervals(widths[1], starts[1], cols.length)
