"""Fit the dense blocks of a grid to a matrix, and write them as GBLR components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..matrix.metric import Metric
from ..matrix.structure import Intervals, StructuredMatrix
from .partition import Partition, cut_blocks

__all__ = ["block_components", "fit_blocks"]


def fit_blocks(
    matrix: Tensor, rows: Partition, cols: Partition, row_part: Sequence[int], col_part: Sequence[int], metric: Metric
) -> Tensor:
    """The dense blocks in given places that are closest to a matrix.

    In the metric of a second moment H the rows of a block row are least-squares problems on its columns J:
    ``(M H)_J (H_JJ)^-1``.

    Args:
        matrix: (m, n) float64.
        rows: R parts of the rows.
        cols: C parts of the columns.
        row_part: Block rows of the N blocks.
        col_part: Their block columns.
        metric: Norm of the error.

    Returns:
        (N, s, p) blocks, zero-filled.
    """
    if metric.moment is not None:
        fitted = torch.zeros_like(matrix)
        for row, (start, size) in enumerate(zip(rows.starts, rows.sizes, strict=True)):
            places = [
                range(cols.starts[j], cols.starts[j] + cols.sizes[j])
                for i, j in zip(row_part, col_part, strict=True)
                if i == row
            ]
            support = torch.tensor([index for place in places for index in place], device=matrix.device)
            if len(support):
                root = torch.linalg.cholesky(metric.moment[support[:, None], support])
                moment = matrix[start : start + size] @ metric.moment[:, support]
                fitted[start : start + size, support] = torch.cholesky_solve(moment.T, root).T
        matrix = fitted
    return cut_blocks(matrix, rows, cols)[list(row_part), list(col_part)]


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
        return block_components(blocks.mT, cols, rows, col_part, row_part).t()
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
