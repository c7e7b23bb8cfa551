"""Dense blocks of a grid as GBLR components."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structure import Intervals, StructuredMatrix
from .partition import Partition

__all__ = ["block_components"]


def block_components(
    blocks: Tensor, rows: Partition, cols: Partition, row_part: Tensor, col_part: Tensor
) -> StructuredMatrix:
    """One component per row of each block, or per column where blocks have fewer columns.

    An h x w block costs h w + min(h, w). No GBLR form of a general block is cheaper: K components of a, b widths have
    ``sum (a + b - 1) = cost - K`` degrees of freedom, and K is at least the rank.

    Args:
        blocks: (N, s, p).
        rows: Parts of the rows, of size at most s.
        cols: Parts of the columns, of size at most p.
        row_part: (N,) int64 part in which each block lies.
        col_part: (N,) int64 likewise.

    Returns:
        The matrix that is the blocks in their places and zero elsewhere.
    """
    if blocks.shape[1] > blocks.shape[2]:
        swapped = block_components(blocks.mT, cols, rows, col_part, row_part)
        return StructuredMatrix(swapped.v, swapped.u, swapped.cols, swapped.rows, swapped.split_sizes)
    number, height = blocks.shape[:2]
    device = blocks.device
    block, line = (
        index.flatten()
        for index in torch.meshgrid(
            torch.arange(number, device=device), torch.arange(height, device=device), indexing="ij"
        )
    )
    real = line < torch.tensor(rows.sizes, device=device)[row_part[block]]
    block, line = block[real], line[real]
    row = torch.tensor(rows.starts, device=device)[row_part[block]] + line
    columns = cols.intervals(col_part[block])
    u = torch.nn.functional.one_hot(row, rows.length).to(blocks.dtype)
    place = torch.nn.functional.one_hot(col_part[block], cols.count).to(blocks.dtype)
    v = cols.join(place[:, :, None] * blocks[block, line][:, None, :])
    return StructuredMatrix.from_factors(u, v, Intervals(torch.ones_like(row), row, rows.length), columns)
