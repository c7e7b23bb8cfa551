r"""A grid of equally ranked low-rank blocks: what block low-rank, ALDS and Monarch matrices share.

Block (i, j) of an R x C grid is ``A_ij B_ij`` of rank c, so the rows of all A_ij of block row i and the columns of all
B_ij of block column j are stored without a gap: c (C m + R n) entries and as many multiply-adds, whatever the shape of
    the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..structure import StructuredMatrix
from .base import FamilyMatrix
from .partition import Partition, cut_blocks, join_blocks

__all__ = ["BlockGrid", "grid_factors"]


def grid_factors(weight: Tensor, rows: Partition, cols: Partition, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of each block by its SVD.

    Args:
        weight: (m, n) float64.
        rows: R parts of the rows.
        cols: C parts of the columns.
        rank: c; blocks with a smaller side get zero components.

    Returns:
        (C, c, m) row factors and (R, c, n) column factors, balanced in norm.
    """
    left, values, right = torch.linalg.svd(cut_blocks(weight, rows, cols), full_matrices=False)
    short = max(rank - values.shape[-1], 0)
    scale = values[..., :rank].sqrt()
    left = left[..., :rank] * scale[..., None, :]
    right = right[..., :rank, :] * scale[..., None]
    if short:
        left = torch.nn.functional.pad(left, (0, short))
        right = torch.nn.functional.pad(right, (0, 0, 0, short))
    return rows.join(left.permute(1, 3, 0, 2)), cols.join(right.permute(0, 2, 1, 3))


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

    @property
    def stored(self) -> int:
        """The c (C m + R n) factor entries."""
        return self.left.numel() + self.right.numel()

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
        return y if bias is None else y + bias

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
