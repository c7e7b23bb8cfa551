"""BLAST matrices: blocks that share their column and row bases and differ in a diagonal coupling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FamilyMatrix, check_count, too_small
from .low_rank import truncated_svd
from .partition import Partition, cut_blocks, join_blocks

__all__ = ["Blast"]

_BLOCKS = 4
_RIDGE = 1e-10  # of the mean diagonal: keeps the normal equations of dependent bases solvable


@dataclass(frozen=True, eq=False)
class Blast(FamilyMatrix):
    r"""Block (i, j) of a b x b grid is ``U_i diag(s_ij) V_j^T``: r (m + n + b^2) multiply-adds (Lee et al. 2024, Eq.
    1-2).

    The projection minimises the Frobenius error over one of U, V, s at a time, each a linear least-squares problem
    with a closed solution, from the truncated SVD (all s_ij = 1 is a low-rank matrix); the error never rises. (The
    paper runs a preconditioned gradient descent whose preconditioner is the inverse of the same normal matrices, Sec.
    3.2.)

    Options:
        blocks: b, default 4, or fewer where the budget does not pay for rank 1.
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
    def _project(cls, weight: Tensor, allowed: int, *, blocks: int | None = None, iterations: int = 60) -> Blast:
        m, n = weight.shape
        if blocks is None:
            fitting = [b for b in range(1, min(_BLOCKS, m, n) + 1) if m + n + b * b <= allowed]
            count = max(fitting, default=1)
        else:
            count = check_count(cls.name, "blocks", blocks, min(m, n))
        check_count(cls.name, "iterations", iterations, 10**6)
        each = m + n + count**2
        rank = allowed // each
        if rank < 1:
            raise too_small(cls.name, weight.shape, allowed, each, f"{count} x {count} blocks of rank 1")
        return cls(*_fit(weight, Partition(m, count), Partition(n, count), rank, iterations))

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

    @property
    def stored(self) -> int:
        """The r (m + n + b^2) factor entries."""
        return self.left.numel() + self.right.numel() + self.coupling.numel()

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
        return y if bias is None else y + bias


def _solve(normal: Tensor, right_side: Tensor) -> Tensor:
    """Least-squares solution from (..., r, r) normal matrices, which may be singular, and (..., r, q) right-hand sides."""
    level = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
    damped = normal + torch.diag_embed((_RIDGE * level)[..., None].expand(normal.shape[:-1]))
    factor, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(right_side, factor)


def _fit(weight: Tensor, rows: Partition, cols: Partition, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares; returns (r, m), (r, n), (r, b, b) float64."""
    u, v = truncated_svd(weight, rank)  # the cost of rank min(m, n) exceeds m n
    blocks = cut_blocks(weight, rows, cols)  # (b, b, s, p)
    s = weight.new_ones(rank, rows.count, cols.count)
    u, v = rows.split(u.T).transpose(0, 1), cols.split(v).transpose(0, 1)  # (b, r, s), (b, r, p)
    for _ in range(iterations):
        s = _couplings(blocks, u, v)
        u = _basis(blocks, s, v)
        v = _basis(blocks.permute(1, 0, 3, 2), s.transpose(1, 2), u)
    return rows.join(u.transpose(0, 1)), cols.join(v.transpose(0, 1)), s


def _couplings(blocks: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Best (r, b, b) couplings: block by block a least-squares problem over u_k v_k^T, whose Gram matrix is a product."""
    gram = (u @ u.mT)[:, None] * (v @ v.mT)[None]
    moment = torch.einsum("iks,ijsp,jkp->ijk", u, blocks, v)
    return _solve(gram, moment[..., None]).squeeze(-1).permute(2, 0, 1)


def _basis(blocks: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Best (b, r, s) row bases for fixed couplings and column bases; one normal matrix per block row."""
    gram = torch.einsum("kij,lij,jkl->ikl", s, s, v @ v.mT)
    moment = torch.einsum("kij,jkp,ijsp->iks", s, v, blocks)
    return _solve(gram, moment)
