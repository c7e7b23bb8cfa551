r"""A grid of equally ranked low-rank blocks: what block low-rank, ALDS and Monarch matrices share.

Block (i, j) of an R x C grid is ``A_ij B_ij`` of rank c, so the rows of all A_ij of block row i and the columns of all
B_ij of block column j are stored without a gap: c (C m + R n) entries and as many multiply-adds, whatever the shape of
the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..matrix.svd import balanced
from .base import FamilyMatrix
from .partition import Partition, cut_blocks, join_blocks

__all__ = ["BlockGrid", "grid_factors"]

_SWEEPS = 4  # over the block columns; the error falls little after the second


def grid_factors(weight: Tensor, rows: Partition, cols: Partition, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """Best factors of each block by its SVD.

    In the metric of a second moment H the block columns are coupled: each in turn takes the exact optimum for the
    present others, a truncated SVD of ``W_j + E H_.j H_jj^-1`` in the metric of ``H_jj``, E being the others' error.

    Args:
        weight: (m, n) float64.
        rows: R parts of the rows.
        cols: C parts of the columns.
        rank: c; blocks with a smaller side get zero components.
        metric: Norm of the error.

    Returns:
        (C, c, m) row factors and (R, c, n) column factors.
    """
    if metric.moment is None:
        left, right = _block_svd(cut_blocks(weight, rows, cols), rank)
        return rows.join(left.permute(1, 3, 0, 2)), cols.join(right.permute(0, 2, 1, 3))
    error = torch.zeros_like(weight)  # at first the others are taken for exact
    lefts: dict[int, Tensor] = {}
    rights: dict[int, Tensor] = {}
    for _ in range(_SWEEPS if cols.count > 1 else 1):
        for j, (start, size) in enumerate(zip(cols.starts, cols.sizes, strict=True)):
            place = slice(start, start + size)
            moment = metric.moment[place, place]
            root = torch.linalg.cholesky(moment)
            coupling = error @ metric.moment[:, place] - error[:, place] @ moment
            target = weight[:, place] + torch.cholesky_solve(coupling.T, root).T
            blocks = rows.split((target @ root).T).permute(1, 2, 0)  # (R, s, p)
            left, white = _block_svd(blocks, rank)
            right = torch.linalg.solve_triangular(root, white, upper=False, left=False)
            lefts[j], rights[j] = rows.join(left.permute(2, 0, 1)), right
            error[:, place] = weight[:, place] - rows.join((left @ right).permute(2, 0, 1)).T
    return torch.stack([lefts[j] for j in range(cols.count)]), torch.cat([rights[j] for j in range(cols.count)], dim=-1)


def _block_svd(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., s, c) and (..., c, p) factors of (..., s, p) blocks, balanced in norm; zero past the blocks' own rank."""
    left, right = balanced(torch.linalg.svd(blocks, full_matrices=False), rank)
    short = max(rank - right.shape[-2], 0)
    return F.pad(left, (0, short)), F.pad(right, (0, 0, 0, short))


@dataclass(frozen=True, eq=False)
class BlockGrid(FamilyMatrix):
    """R x C blocks of rank c: c (C m + R n) multiply-adds.

    Args:
        left: (C, c, m): entry [j, :, i] is row i of A in block column j.
        right: (R, c, n): entry [i, :, j] is column j of B in block row i.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def rank(self) -> int:
        """Rank c of each block."""
        return self.left.shape[1]

    @property
    def rows(self) -> Partition:
        """The R parts of the rows."""
        return Partition(self.left.shape[-1], self.right.shape[0])

    @property
    def cols(self) -> Partition:
        """The C parts of the columns."""
        return Partition(self.right.shape[-1], self.left.shape[0])

    def to_dense(self) -> Tensor:
        """All blocks, multiplied out."""
        blocks = torch.einsum("jcis,icjp->ijsp", self.rows.split(self.left), self.cols.split(self.right))
        dense = join_blocks(blocks, self.rows, self.cols)
        order = self.row_order
        return dense if order is None else dense[torch.argsort(order)]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two batched products: over the C parts of the input, then over the R parts of the output."""
        z = torch.einsum("...jp,icjp->...ijc", self.cols.split(x), self.cols.split(self.right))
        y = self.rows.join(torch.einsum("...ijc,jcis->...is", z, self.rows.split(self.left)))
        order = self.row_order
        if order is not None:
            y = y.index_select(-1, torch.argsort(order))
        return y if bias is None else y + bias.to(y.dtype)

    def to_structured(self) -> StructuredMatrix:
        """R C c components, each on one block, at equal cost; the rows in ``row_order``."""
        (count_c, rank, m), (count_r, _, n) = self.left.shape, self.right.shape
        row_part, col_part, _ = torch.meshgrid(
            *(torch.arange(size, device=self.left.device) for size in (count_r, count_c, rank)), indexing="ij"
        )
        return StructuredMatrix.from_factors(
            self.left.expand(count_r, -1, -1, -1).reshape(-1, m),
            self.right[:, None].expand(-1, count_c, -1, -1).reshape(-1, n),
            self.rows.intervals(row_part.flatten()),
            self.cols.intervals(col_part.flatten()),
        )
