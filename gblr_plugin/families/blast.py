"""BLAST matrices: blocks that share their column and row bases and differ in a diagonal coupling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix.metric import Metric
from ..matrix.svd import truncated_svd
from .base import FamilyMatrix
from .checks import check_count, too_small
from .partition import Partition, cut_blocks, join_blocks

__all__ = ["Blast"]

_BLOCKS = 16
_MOMENTUM, _MOST_MOMENTUM = 0.5, 3.0  # times the last step; 3 to 5 times fewer sweeps than without
_RIDGE = 1e-10  # share of the mean diagonal: keeps the normal equations of dependent bases solvable


@dataclass(frozen=True, eq=False)
class Blast(FamilyMatrix):
    r"""Block (i, j) of a b x b grid is ``U_i diag(s_ij) V_j^T`` (Lee et al. 2024, Eq. 2).

    It costs r (m + n + b^2) multiply-adds. The projection starts from the truncated SVD (with all s_ij = 1 the matrix
    has low rank) and minimises the Frobenius error over U, V and s in turn, each a linear least-squares problem. Each
    sweep starts from a point extrapolated along the last step, and is kept only if it lowers the error. (The paper runs
    a preconditioned gradient descent whose preconditioners are the inverses of the same normal matrices.)

    Options:
        blocks: b, default 16, or fewer so that the couplings take at most an eighth of the bases.
        iterations: Sweeps over U, V and s; default 60.

    Args:
        left: (r, m): column k of all U_i.
        right: (r, n): column k of all V_j.
        coupling: (r, b, b): s_ij.
    """

    name = "blast"
    left: Tensor
    right: Tensor
    coupling: Tensor

    @classmethod
    def _project(
        cls, weight: Tensor, max_multiply_adds: int, *, metric: Metric, blocks: int | None = None, iterations: int = 60
    ) -> Blast:
        m, n = weight.shape
        if blocks is None:
            count = max(1, min(_BLOCKS, m, n, math.isqrt((m + n) // 8), math.isqrt(max(max_multiply_adds - m - n, 0))))
        else:
            count = check_count(cls.name, "blocks", blocks, min(m, n))
        check_count(cls.name, "iterations", iterations, 10**6)
        each = m + n + count**2
        rank = max_multiply_adds // each
        if rank < 1:
            raise too_small(cls.name, weight.shape, max_multiply_adds, each, f"{count} x {count} blocks of rank 1")
        rows, cols = Partition(m, count), Partition(n, count)
        if metric.moment is None:
            return cls(*_balanced(*_fit(weight, rows, cols, rank, iterations)))
        return cls(*_balanced(*_fit_outputs(weight, rows, cols, rank, iterations, metric)))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def rows(self) -> Partition:
        """The b parts of the rows."""
        return Partition(self.left.shape[1], self.coupling.shape[1])

    @property
    def cols(self) -> Partition:
        """The b parts of the columns."""
        return Partition(self.right.shape[1], self.coupling.shape[2])

    def to_dense(self) -> Tensor:
        """All blocks, multiplied out."""
        u, v = self.rows.split(self.left), self.cols.split(self.right)
        mixed = torch.einsum("kij,kjp->ikjp", self.coupling, v)
        return join_blocks(torch.einsum("kis,ikjp->ijsp", u, mixed), self.rows, self.cols)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Project each part of the input on its basis, couple, expand each part of the output."""
        z = torch.einsum("...jp,kjp->...jk", self.cols.split(x), self.cols.split(self.right))
        z = torch.einsum("...jk,kij->...ik", z, self.coupling)
        y = self.rows.join(torch.einsum("...ik,kis->...is", z, self.rows.split(self.left)))
        return y if bias is None else y + bias.to(y.dtype)


def _solve(normal: Tensor, right_side: Tensor) -> Tensor:
    """Least squares from (..., r, r) normal matrices, which may be singular, and (..., r, q) right-hand sides."""
    level = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
    damped = normal + torch.diag_embed((_RIDGE * level)[..., None].expand(normal.shape[:-1]))
    factor, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(right_side, factor)


def _fit(weight: Tensor, rows: Partition, cols: Partition, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares with momentum; returns (r, m), (r, n), (r, b, b) float64."""
    left, right = truncated_svd(weight, rank)  # the cost of rank min(m, n) exceeds m n
    blocks = cut_blocks(weight, rows, cols).contiguous()  # (b, b, s, p)
    mirrored = blocks.permute(1, 0, 3, 2).contiguous()
    u, v = rows.split(left.T).transpose(0, 1), cols.split(right).transpose(0, 1)  # (b, r, s), (b, r, p)
    s = weight.new_ones(rank, rows.count, cols.count)
    moved_u, moved_v = torch.zeros_like(u), torch.zeros_like(v)
    explained, momentum, ahead = -math.inf, 0.0, _MOMENTUM
    for _ in range(iterations):
        start_v = v + momentum * moved_v
        new_s = _couplings(blocks, u + momentum * moved_u, start_v)
        new_u, _ = _basis(blocks, new_s, start_v)
        new_v, energy = _basis(mirrored, new_s.transpose(1, 2), new_u)
        if energy < explained and momentum > 0:  # went too far: a plain sweep, then more carefully
            momentum, ahead = 0.0, ahead / 2
            continue
        moved_u, moved_v, u, v, s, explained = new_u - u, new_v - v, new_u, new_v, new_s, energy
        momentum, ahead = ahead, min(1.2 * ahead, _MOST_MOMENTUM)
    return rows.join(u.transpose(0, 1)), cols.join(v.transpose(0, 1)), s


def _fit_outputs(
    weight: Tensor, rows: Partition, cols: Partition, rank: int, iterations: int, metric: Metric
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares in the metric of a second moment H; returns (r, m), (r, n), (r, b, b) float64.

    H couples the block columns. With E the error of the others, block column j is fitted to ``W_j + E H_.j H_jj^-1``
    in the metric of ``H_jj``, first its couplings and then its basis; the row bases are fitted in the whole metric.
    """
    left, v = truncated_svd(weight, rank, metric.of_inputs())
    moment = metric.moment
    assert moment is not None
    targets = rows.split(weight.T)  # (n, b, s)
    u = rows.split(left.T).transpose(0, 1)  # (b, r, s)
    s = weight.new_ones(rank, rows.count, cols.count)
    error = weight - left @ v
    for _ in range(iterations):
        by_row = u @ u.mT
        for j, (start, size) in enumerate(zip(cols.starts, cols.sizes, strict=True)):
            place = slice(start, start + size)
            local = moment[place, place]
            coupling = error @ moment[:, place] - error[:, place] @ local
            wanted = weight[:, place] + torch.cholesky_solve(coupling.T, torch.linalg.cholesky(local)).T
            projected = u @ rows.split(wanted.T).permute(1, 2, 0)  # (b, r, p)
            seen = v[:, place] @ local
            gram = by_row * (seen @ v[:, place].T)
            s_j = _solve(gram, (projected * seen).sum(-1, keepdim=True)).squeeze(-1)  # (b, r)
            normal = (s_j[:, :, None] * by_row * s_j[:, None, :]).sum(0)
            v[:, place] = _solve(normal, (s_j[:, :, None] * projected).sum(0))
            s[:, :, j] = s_j.T
            fitted = torch.einsum("ik,iks,kp->pis", s_j, u, v[:, place])
            error[:, place] = weight[:, place] - rows.join(fitted).T
        mixed = cols.join(torch.einsum("kij,kjp->ikjp", s, cols.split(v)))  # (b, r, n)
        seen = mixed @ moment
        u = _solve(seen @ mixed.mT, torch.einsum("ikn,nis->iks", seen, targets))
        error = weight - rows.join(torch.einsum("iks,ikn->nis", u, mixed)).T
    return rows.join(u.transpose(0, 1)), v, s


def _balanced(u: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same matrix with couplings of mean square 1 and columns of U and V of equal norm, which suits training."""
    tiny = torch.finfo(s.dtype).tiny
    size = s.square().mean((1, 2)).sqrt().clamp(min=tiny)
    norm_u, norm_v = u.norm(dim=1).clamp(min=tiny), v.norm(dim=1).clamp(min=tiny)
    each = (size * norm_u * norm_v).sqrt()
    return u * (each / norm_u)[:, None], v * (each / norm_v)[:, None], s / size[:, None, None]


def _couplings(blocks: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Best (r, b, b) couplings: for each block least squares over all u_k v_k^T, whose Gram matrix is a product."""
    by_row, by_col = u @ u.mT, v @ v.mT
    moment = torch.einsum("iks,ijsp,jkp->ijk", u, blocks, v)
    # A block row at a time: all Gram matrices together would take b^2 r^2 entries.
    solved = [_solve(gram * by_col, rows[..., None]).squeeze(-1) for gram, rows in zip(by_row, moment, strict=True)]
    return torch.stack(solved).permute(2, 0, 1)


def _basis(blocks: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Best (b, r, s) row bases for fixed couplings and column bases, and the squared norm that they explain."""
    gram = torch.einsum("kij,lij,jkl->ikl", s, s, v @ v.mT)  # one normal matrix per block row
    moment = torch.einsum("kij,jkp,ijsp->iks", s, v, blocks)
    u = _solve(gram, moment)
    return u, float((u * moment).sum())
