"""Block-diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from .base import FamilyMatrix
from .checks import check_count, too_small
from .dense_blocks import block_components, fit_blocks
from .partition import Partition

__all__ = ["BlockDiagonal"]


@dataclass(frozen=True, eq=False)
class BlockDiagonal(FamilyMatrix):
    """b dense blocks on the diagonal: m n / b multiply-adds (their total size where b does not divide m, n).

    The closest member keeps the diagonal blocks. As a GBLR matrix each block takes one component per row (or column,
    if there are fewer), and one multiply-add more for each: a rank-1 block of h x w has h + w - 1 degrees of freedom
    for h + w.

    Options:
        blocks: b; default the least number of blocks that is within the budget.

    Args:
        blocks: (b, s, p) blocks; zero-filled past the smaller blocks' last row and column.
        rows: b parts of the rows.
        cols: b parts of the columns.
    """

    name = "block_diagonal"
    blocks: Tensor
    rows: Partition
    cols: Partition

    @classmethod
    def _project(
        cls, weight: Tensor, max_multiply_adds: int, *, metric: Metric, blocks: int | None = None
    ) -> BlockDiagonal:
        m, n = weight.shape

        def cost(count: int) -> int:
            return sum(s * p for s, p in zip(Partition(m, count).sizes, Partition(n, count).sizes, strict=True))

        most = min(m, n)
        if blocks is None:
            count = next((c for c in range(1, most + 1) if cost(c) <= max_multiply_adds), most)
        else:
            count = check_count(cls.name, "blocks", blocks, most)
        if cost(count) > max_multiply_adds:
            raise too_small(cls.name, weight.shape, max_multiply_adds, cost(count), f"{count} diagonal blocks")
        rows, cols = Partition(m, count), Partition(n, count)
        return cls(fit_blocks(weight, rows, cols, range(count), range(count), metric), rows, cols)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.rows.length, self.cols.length

    @property
    def stored(self) -> int:
        """Sum of the blocks' sizes."""
        return sum(s * p for s, p in zip(self.rows.sizes, self.cols.sizes, strict=True))

    def to_dense(self) -> Tensor:
        """The blocks on their diagonal."""
        dense = [self.blocks[i, :s, :p] for i, (s, p) in enumerate(zip(self.rows.sizes, self.cols.sizes, strict=True))]
        placed: Tensor = torch.block_diag(*dense)
        return placed

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One batched product over the blocks."""
        y: Tensor = self.rows.join(torch.einsum("...bp,bsp->...bs", self.cols.split(x), self.blocks))
        return y if bias is None else y + bias.to(y.dtype)

    def to_structured(self) -> StructuredMatrix:
        """Exactly this matrix, at one multiply-add more per component."""
        block = torch.arange(self.rows.count, device=self.blocks.device)
        return block_components(self.blocks, self.rows, self.cols, block, block)
