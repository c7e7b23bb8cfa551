"""Monarch matrices: two block-diagonal factors with a fixed shuffle between and after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix.metric import Metric
from .checks import check_count, too_small
from .grid import BlockGrid, grid_factors
from .partition import Partition

__all__ = ["Monarch"]


@dataclass(frozen=True, eq=False)
class Monarch(BlockGrid):
    r"""``W = P L P^T R`` with block-diagonal L and R (Dao et al. 2022, Definition 3.1): c b (m + n) multiply-adds.

    R splits the n inputs in b consecutive blocks, and sends c channels of each block to each of the b blocks of L. P
    interleaves the outputs of these: output i belongs to block i mod b. So the sub-matrix of the rows i = j (mod b) and
    the columns of input block k has rank c (1 in the square case of the paper), and an SVD of each such sub-matrix
    gives the closest Monarch matrix (Theorem 1 there). Up to the order of its rows it is a block low-rank matrix, and
    so a GBLR matrix of equal cost. If m or n is no multiple of b, blocks differ in size by one.

    Options:
        block_rank: c, default 1; the budget then sets the number of blocks b.
        blocks: b (4 in the published language and vision models); the budget then sets c, unless c is given too.
    """

    name = "monarch"

    @classmethod
    def _project(
        cls,
        weight: Tensor,
        max_multiply_adds: int,
        *,
        metric: Metric,
        blocks: int | None = None,
        block_rank: int | None = None,
    ) -> Monarch:
        m, n = weight.shape
        units = max_multiply_adds // (m + n)  # largest c b within the budget
        if block_rank is not None:
            check_count(cls.name, "block_rank", block_rank, min(m, n))
        if blocks is None:
            rank = block_rank or 1
            count = max(1, min(units // rank, m, n))
        else:
            count = check_count(cls.name, "blocks", blocks, min(m, n))
            rank = block_rank or max(1, min(units // count, -(-min(m, n) // count)))
        if count * rank > units:
            what = f"{count} blocks of rank {rank}"
            raise too_small(cls.name, weight.shape, max_multiply_adds, count * rank * (m + n), what)
        order = _interleaved(m, count, weight.device)
        return cls(*grid_factors(weight[order], Partition(m, count), Partition(n, count), rank, metric))

    @property
    def row_order(self) -> Tensor:
        """Rows sorted by their number modulo b: those of one block of L follow each other."""
        return _interleaved(self.shape[0], self.rows.count, self.left.device)


def _interleaved(length: int, count: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return index[torch.argsort(index % count, stable=True)]
