"""Defining properties of the families of dense blocks: block-diagonal, block-sparse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gblr_plugin.errors import ConfigError
from gblr_plugin.families.block_diagonal import BlockDiagonal
from gblr_plugin.families.block_sparse import BlockSparse, butterfly
from gblr_plugin.families.partition import Partition, cut_blocks, join_blocks


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "count"), [(12, 3), (13, 4), (7, 7), (5, 1), (31, 9)])
def test_partition_cuts_and_joins(length: int, count: int) -> None:
    part = Partition(length, count)
    assert sum(part.sizes) == length
    assert max(part.sizes) - min(part.sizes) <= 1
    x = gaussian(2, length)
    pieces = part.split(x)
    assert pieces.shape == (2, count, part.size)
    for index, (start, size) in enumerate(zip(part.starts, part.sizes, strict=True)):
        assert torch.equal(pieces[:, index, :size], x[:, start : start + size])
        assert not pieces[:, index, size:].any()
    assert torch.equal(part.join(pieces), x)
    matrix = gaussian(length, 10)
    assert torch.equal(join_blocks(cut_blocks(matrix, part, Partition(10, 3)), part, Partition(10, 3)), matrix)


def test_block_diagonal_keeps_the_diagonal_blocks() -> None:
    weight = gaussian(12, 8)
    matrix = BlockDiagonal.from_dense(weight, 0.25)
    assert matrix.stored == 12 * 8 // 4
    assert torch.equal(matrix.to_dense(), weight * torch.kron(torch.eye(4), torch.ones(3, 2)))
    blocks = [gaussian(3, 2, seed=seed) for seed in range(4)]
    assert torch.equal(BlockDiagonal.from_dense(torch.block_diag(*blocks), 0.25).to_dense(), torch.block_diag(*blocks))
    with pytest.raises(ConfigError, match="blocks must be an integer from 1 to 8"):
        BlockDiagonal.from_dense(weight, 0.5, blocks=9)


def test_calibrated_blocks_are_least_squares_on_their_columns() -> None:
    weight, inputs = gaussian(6, 8), gaussian(100, 8, seed=1) @ gaussian(8, 8, seed=2)
    matrix = BlockDiagonal.from_dense(weight, 0.5, calibration=inputs).to_dense()
    residual = inputs @ (weight - matrix).T
    for rows, cols in ((slice(0, 3), slice(0, 4)), (slice(3, 6), slice(4, 8))):
        wanted = inputs @ weight[rows].T
        solution = torch.linalg.lstsq(inputs[:, cols], wanted).solution
        best = (wanted - inputs[:, cols] @ solution).square().sum()
        assert float(residual[:, rows].square().sum()) == pytest.approx(float(best), rel=1e-3)


def test_butterfly_pattern_is_the_support_of_the_factors() -> None:
    # Block butterfly factors of stride k couple blocks whose numbers differ in the bit of k (Chen et al. 2022, Sec. 3).
    size = 8
    support = torch.eye(size, dtype=torch.bool)
    for strides in range(4):
        row, col = butterfly(size, size, strides)
        found = torch.zeros(size, size, dtype=torch.bool)
        found[list(row), list(col)] = True
        assert torch.equal(found, support)
        assert len(row) == size * (1 + strides)
        factor = torch.kron(torch.eye(size >> (strides + 1)), torch.kron(torch.ones(2, 2), torch.eye(1 << strides)))
        if strides < 3:
            support = support | factor.bool()


def test_butterfly_reaches_every_row_and_column_of_any_grid() -> None:
    for rows, cols in ((3, 8), (8, 3), (5, 7), (1, 4), (16, 16)):
        row, col = butterfly(rows, cols, 0)
        assert set(row) == set(range(rows))
        assert set(col) == set(range(cols))


def test_block_sparse_splits_the_budget() -> None:
    weight = gaussian(64, 64)
    matrix = BlockSparse.from_dense(weight, 0.5, block=8)
    # 8 x 8 blocks of 8 x 8: at most 3/4 of 0.5 * 64 blocks, so 24 = 8 (1 + 2 factors); the rest is low rank.
    assert matrix.blocks.shape == (24, 8, 8)
    assert matrix.left.shape[1] == (2048 - 24 * 64) // 128
    assert matrix.stored == 24 * 64 + 4 * 128
    pure = BlockSparse.from_dense(weight, 0.5, block=8, low_rank_share=0.0)
    assert pure.blocks.shape == (32, 8, 8)
    assert pure.left.shape[1] == 0
    dense = pure.to_dense()
    assert torch.equal(dense[dense != 0], weight[dense != 0])
    assert int((dense != 0).sum()) == 2048
    with pytest.raises(ConfigError, match="low_rank_share"):
        BlockSparse.from_dense(weight, 0.5, low_rank_share=1.0)
    with pytest.raises(ConfigError, match="a diagonal of 32 x 32 blocks"):
        BlockSparse.from_dense(weight, 0.5, block=32)


def test_block_sparse_alternation_never_raises_the_error() -> None:
    weight = gaussian(32, 48) + 3 * gaussian(32, 2) @ gaussian(2, 48, seed=1)
    errors = [
        float(torch.linalg.norm(weight - BlockSparse.from_dense(weight, 0.4, block=4, iterations=steps).to_dense()))
        for steps in (1, 2, 5, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
