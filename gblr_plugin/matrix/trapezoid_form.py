r"""Trapezoid form: any product of rank r can be written with factors that are trapezoids, at fewer multiply-adds.

A product A C of rank r equals (A R) (R^-1 C) for any invertible R, which has r^2 numbers. They suffice to make A lower
trapezoidal (component k on rows k .. m) and C upper trapezoidal (component k on columns k .. n). Both are intervals, so
the cost falls from r (m + n) to r (m + n) - r (r - 1). An LQ factorisation makes A trapezoidal. An LU factorisation
without row exchanges makes C trapezoidal; the row and the column at which the zeros begin are chosen so that its
entries do not grow much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .structure import Intervals, StructuredMatrix
from .tiles import TiledAxis

__all__ = ["lu_no_pivot", "trapezoid_form"]

MAX_GROWTH = 1e6
"""Largest accepted growth of the factors: past it float32 copies of them would lose the product."""
ROW_OFFSETS = 4
COL_OFFSETS = 8
"""Numbers of rows and of columns at which the triangles may begin; of all pairs the one of least growth is kept."""


def lu_no_pivot(matrix: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """(L, U) with L unit lower triangular and ``L U = matrix``, without exchanging rows.

    Args:
        matrix: (..., r, r) floating point, all leading minors non-zero (else the factors are not finite).
        block: Size below which columns are eliminated one by one.
    """
    size = matrix.shape[-1]
    if size <= block:
        work = matrix.clone()
        for k in range(size - 1):
            work[..., k + 1 :, k] /= work[..., k, k, None].clone()
            work[..., k + 1 :, k + 1 :] -= work[..., k + 1 :, k, None] * work[..., k, None, k + 1 :]
        return torch.tril(work, -1) + torch.eye(size, dtype=work.dtype, device=work.device), torch.triu(work)
    half = size // 2
    lower, upper = torch.zeros_like(matrix), torch.zeros_like(matrix)
    lower[..., :half, :half], upper[..., :half, :half] = lu_no_pivot(matrix[..., :half, :half], block)
    upper[..., :half, half:] = torch.linalg.solve_triangular(
        lower[..., :half, :half], matrix[..., :half, half:], upper=False, unitriangular=True
    )
    lower[..., half:, :half] = torch.linalg.solve_triangular(
        upper[..., :half, :half], matrix[..., half:, :half], upper=True, left=False
    )
    schur = matrix[..., half:, half:] - lower[..., half:, :half] @ upper[..., :half, half:]
    lower[..., half:, half:], upper[..., half:, half:] = lu_no_pivot(schur, block)
    return lower, upper


def _offsets(axis: TiledAxis, count: int) -> range:
    """Indices at which the zeros of an axis may begin; a wrapped start is on the grid only where tiles divide it."""
    step = max(axis.tile, axis.length // count // axis.tile * axis.tile)
    return range(0, axis.length, step) if axis.cyclic else range(1)


def _shift(interval: Intervals, offset: int) -> Intervals:
    return Intervals.of_known(interval.width, (interval.start + offset) % interval.length, interval.length)


def trapezoid_form(left: Tensor, right: Tensor, rows: TiledAxis, cols: TiledAxis) -> StructuredMatrix | None:
    """The product ``left @ right`` in trapezoid form.

    Args:
        left: (m, r) float64.
        right: (r, n) float64.
        rows: The axis of the m rows, with its tile.
        cols: The axis of the n columns, with its tile.

    Returns:
        A matrix equal to ``left @ right`` up to rounding, its components balanced in norm; ``None`` where no offset
        keeps the growth below ``MAX_GROWTH`` (leading minors that vanish, e.g. of block-diagonal matrices).
    """
    rank = len(right)
    # Norms of columns of `left @ x`, and of rows of `x @ right`, are those of products with these (r, r) matrices.
    core_left, core_right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.T, mode="r").R.T
    scale = float(torch.linalg.norm(core_left) * torch.linalg.norm(core_right)) or 1.0
    across = list(_offsets(cols, COL_OFFSETS))
    best: tuple[float, int, int] | None = None
    for down in _offsets(rows, ROW_OFFSETS):
        basis = _lowering(left, down)
        leading = [torch.roll(basis.T @ right, -offset, 1)[:, :rank] for offset in across]
        lower, _ = lu_no_pivot(torch.stack(leading))
        product = _norms(core_left @ basis, lower, basis.T @ core_right)
        growth = (product.amax(1) / scale).nan_to_num(nan=torch.inf)
        least = int(growth.argmin())
        if growth[least] <= MAX_GROWTH and (best is None or growth[least] < best[0]):
            best = float(growth[least]), down, across[least]
    return None if best is None else _trapezoids(left, right, rows, cols, best[1:])


def _lowering(left: Tensor, down: int) -> Tensor:
    """(r, r) orthogonal matrix with which the rows of ``left`` from ``down`` on become lower trapezoidal."""
    rank = left.shape[1]
    # LQ of the leading block, as the QR of its transpose.
    basis: Tensor = torch.linalg.qr(torch.roll(left, -down, 0)[:rank].T).Q
    return basis


def _norms(left: Tensor, lower: Tensor, right: Tensor) -> Tensor:
    """(offsets, r) norms of the components: of the columns of ``left L`` times those of the rows of ``L^-1 right``."""
    solved = torch.linalg.solve_triangular(lower, right.expand_as(lower), upper=False, unitriangular=True)
    products: Tensor = torch.linalg.norm(left @ lower, dim=1) * torch.linalg.norm(solved, dim=2)
    return products


def _trapezoids(
    left: Tensor, right: Tensor, rows: TiledAxis, cols: TiledAxis, offsets: tuple[int, int]
) -> StructuredMatrix:
    """The trapezoids that begin at these offsets of the rows and of the columns."""
    down, across = offsets
    rank, basis = len(right), _lowering(left, down)
    turned = torch.roll(basis.T @ right, -across, 1)
    lower, _ = lu_no_pivot(turned[:, :rank])
    new_left = torch.roll(left, -down, 0) @ basis @ lower
    new_right = torch.linalg.solve_triangular(lower, turned, upper=False, unitriangular=True)
    norm_left, norm_right = torch.linalg.norm(new_left, dim=0), torch.linalg.norm(new_right, dim=1)
    balance = torch.where(norm_left * norm_right > 0, (norm_right / norm_left).sqrt(), torch.ones_like(norm_left))
    u = torch.roll((new_left * balance).T, down, 1)
    v = torch.roll(new_right / balance[:, None], across, 1)
    row_intervals, col_intervals = rows.trailing(rank, left.device), cols.trailing(rank, left.device)
    return StructuredMatrix.from_factors(u, v, _shift(row_intervals, down), _shift(col_intervals, across))
