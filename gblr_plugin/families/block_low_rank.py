"""Block low-rank (BLR) matrices: a grid of blocks, each of low rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..matrix.metric import Metric
from .checks import check_count, too_small
from .grid import BlockGrid, grid_factors
from .partition import Partition

__all__ = ["BlockLowRank"]

_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class BlockLowRank(BlockGrid):
    """R x C blocks of rank c: c (C m + R n) multiply-adds (Amestoy et al. 2015, with one rank for all blocks).

    The closest member is each block's truncated SVD; the budget sets the rank. As a GBLR matrix: R C c components,
    each on one block, at equal cost.

    Options:
        blocks: An int B (B x B blocks), a pair (R, C), or ``None`` for 4 x 4, or fewer where the budget does not pay
            for blocks of rank 1.
    """

    name = "block_low_rank"

    @classmethod
    def _project(
        cls, weight: Tensor, max_multiply_adds: int, *, metric: Metric, blocks: int | tuple[int, int] | None = None
    ) -> BlockLowRank:
        m, n = weight.shape
        if blocks is None:
            blocks = max(1, min(_BLOCKS, m, n, max_multiply_adds // (m + n)))
        pair = blocks if isinstance(blocks, (tuple, list)) and len(blocks) == 2 else (blocks, blocks)
        rows = Partition(m, check_count(cls.name, "blocks", pair[0], m))
        cols = Partition(n, check_count(cls.name, "blocks", pair[1], n))
        each = cols.count * m + rows.count * n
        rank = min(max_multiply_adds // each, rows.size, cols.size)
        if rank < 1:
            raise too_small(
                cls.name, weight.shape, max_multiply_adds, each, f"{rows.count} x {cols.count} blocks of rank 1"
            )
        return cls(*grid_factors(weight, rows, cols, rank, metric))
