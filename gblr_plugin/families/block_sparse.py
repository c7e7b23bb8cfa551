"""Block-sparse matrices in a flat butterfly pattern, plus low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..matrix.svd import truncated_svd
from .base import FamilyMatrix
from .checks import check_count, too_small
from .dense_blocks import block_components, fit_blocks
from .partition import Partition, join_blocks

Pattern = tuple[tuple[int, ...], tuple[int, ...]]

__all__ = ["BlockSparse", "butterfly"]

_BLOCK = 32
_LOW_RANK_SHARE = 0.25


def butterfly(rows: int, cols: int, strides: int) -> Pattern:
    """Row and column numbers of the blocks of a flat block butterfly (Chen et al. 2022, Definition 3.4).

    On a square grid of G = 2^q blocks: the diagonal, and (i, j) whose numbers differ in one of the lowest ``strides``
    bits, which is the sum of the butterfly factors of strides 1, 2, ... An R x C grid is laid over the largest such
    grid that fits.

    Args:
        rows: R block rows.
        cols: C block columns.
        strides: Number of butterfly factors, from 0 to log2 G.

    Returns:
        Block rows and block columns of the pattern, by rows.
    """
    size = 1 << (min(rows, cols).bit_length() - 1)
    row, col = torch.arange(rows) * size // rows, torch.arange(cols) * size // cols
    bits = row[:, None] ^ col
    live = bits == 0
    for stride in range(strides):
        live |= bits == 1 << stride
    first, second = live.nonzero(as_tuple=True)
    return tuple(first.tolist()), tuple(second.tolist())


@dataclass(frozen=True, eq=False)
class BlockSparse(FamilyMatrix):
    """``W = B + L R``: dense blocks B in a fixed butterfly pattern and r components of low rank (Chen et al. 2022).

    Multiply-adds: the sizes of the live blocks and r (m + n). The projection alternates between the blocks of W - L R
    and the truncated SVD of W - B; each step is the exact optimum, so the error never rises. As a GBLR matrix the
    dense blocks take one multiply-add more per component, see
    :class:`~gblr_plugin.families.block_diagonal.BlockDiagonal`.

    Options:
        block: Largest side of a block. Default 32, halved until the budget allows the diagonal blocks.
        low_rank_share: Least share of the budget for the low-rank part, default 0.25; the low-rank part also takes the
            multiply-adds that are too few for another butterfly factor. 0 gives a purely block-sparse matrix.
        iterations: Alternations, default 10.

    Args:
        blocks: (N, s, p) live blocks; zero-filled past smaller blocks' last row and column.
        left: (m, r).
        right: (r, n).
        rows: Parts of the rows.
        cols: Parts of the columns.
        pattern: Block rows and block columns of the live blocks.
    """

    name = "block_sparse"
    blocks: Tensor
    left: Tensor
    right: Tensor
    rows: Partition
    cols: Partition
    pattern: Pattern

    @classmethod
    def _project(
        cls,
        weight: Tensor,
        max_multiply_adds: int,
        *,
        metric: Metric,
        block: int | None = None,
        low_rank_share: float = _LOW_RANK_SHARE,
        iterations: int = 10,
    ) -> BlockSparse:
        m, n = weight.shape
        if not isinstance(low_rank_share, (int, float)) or not 0 <= low_rank_share < 1:
            raise ConfigError(f"{cls.name}: low_rank_share must be a number in [0, 1), got {low_rank_share!r}")
        check_count(cls.name, "iterations", iterations, 10**6)
        side = _BLOCK if block is None else check_count(cls.name, "block", block, max(m, n))
        pattern = _largest(m, n, side, (1 - low_rank_share) * max_multiply_adds)
        while pattern is None and block is None and side > 1:
            side //= 2
            pattern = _largest(m, n, side, (1 - low_rank_share) * max_multiply_adds)
        if pattern is None:
            rows, cols = _grid(m, n, side)
            least = _cost(rows, cols, butterfly(rows.count, cols.count, 0))
            raise too_small(
                cls.name,
                weight.shape,
                max_multiply_adds,
                round(least / (1 - low_rank_share)),
                f"a diagonal of {side} x {side} blocks",
            )
        rows, cols, index = pattern
        rank = (max_multiply_adds - _cost(rows, cols, index)) // (m + n) if low_rank_share else 0
        rank = min(rank, m, n)
        left, right = weight.new_zeros(m, rank), weight.new_zeros(rank, n)
        blocks = fit_blocks(weight, rows, cols, *index, metric)
        for _ in range(iterations if rank else 0):
            left, right = truncated_svd(weight - _place(blocks, rows, cols, index), rank, metric.of_inputs())
            blocks = fit_blocks(weight - left @ right, rows, cols, *index, metric)
        return cls(blocks, left, right, rows, cols, index)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.rows.length, self.cols.length

    @property
    def stored(self) -> int:
        """Sizes of the live blocks and r (m + n)."""
        return _cost(self.rows, self.cols, self.pattern) + self.left.numel() + self.right.numel()

    def to_dense(self) -> Tensor:
        """B + L R."""
        return _place(self.blocks, self.rows, self.cols, self.pattern) + self.left @ self.right

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A batched product over the live blocks, summed by block rows, and the low-rank product."""
        row, col = (torch.tensor(numbers, device=x.device) for numbers in self.pattern)
        z = torch.einsum("...bp,bsp->...bs", self.cols.split(x).index_select(-2, col), self.blocks)
        y = z.new_zeros(*z.shape[:-2], self.rows.count, z.shape[-1]).index_add(-2, row, z)
        return self.rows.join(y) + F.linear(F.linear(x, self.right), self.left, bias)

    def to_structured(self) -> StructuredMatrix:
        """Exactly this matrix, at one multiply-add more per component of the dense blocks."""
        row, col = (torch.tensor(numbers, device=self.blocks.device) for numbers in self.pattern)
        sparse = block_components(self.blocks, self.rows, self.cols, row, col)
        low = StructuredMatrix.from_factors(self.left.T.contiguous(), self.right)
        return StructuredMatrix.sum([sparse, low])


def _grid(m: int, n: int, side: int) -> tuple[Partition, Partition]:
    return Partition(m, -(-m // side)), Partition(n, -(-n // side))


def _cost(rows: Partition, cols: Partition, index: Pattern) -> int:
    heights, widths = rows.sizes, cols.sizes
    return sum(heights[i] * widths[j] for i, j in zip(*index, strict=True))


def _largest(m: int, n: int, side: int, max_multiply_adds: float) -> tuple[Partition, Partition, Pattern] | None:
    """The pattern of blocks of this side with the most butterfly factors that cost at most ``max_multiply_adds``."""
    rows, cols = _grid(m, n, side)
    for strides in reversed(range(min(rows.count, cols.count).bit_length())):
        index = butterfly(rows.count, cols.count, strides)
        if _cost(rows, cols, index) <= max_multiply_adds:
            return rows, cols, index
    return None


def _place(blocks: Tensor, rows: Partition, cols: Partition, index: Pattern) -> Tensor:
    grid = blocks.new_zeros(rows.count, cols.count, *blocks.shape[1:])
    place = tuple(torch.tensor(numbers, device=blocks.device) for numbers in index)
    return join_blocks(grid.index_put(place, blocks), rows, cols)
