"""Defining properties of the families of low-rank blocks: block low-rank, ALDS, Monarch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gblr_plugin.errors import ConfigError
from gblr_plugin.families.alds import Alds
from gblr_plugin.families.block_low_rank import BlockLowRank
from gblr_plugin.families.monarch import Monarch


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_blocks_have_the_rank_and_are_their_best_approximation() -> None:
    weight = gaussian(12, 18)
    matrix = BlockLowRank.from_dense(weight, 0.7, blocks=(2, 3))
    rank = int(0.7 * 12 * 18) // (3 * 12 + 2 * 18)
    assert matrix.rank == rank
    assert matrix.stored == rank * (3 * 12 + 2 * 18)
    dense = matrix.to_dense()
    for i in range(2):
        for j in range(3):
            place = slice(6 * i, 6 * i + 6), slice(6 * j, 6 * j + 6)
            left, values, right = torch.linalg.svd(weight[place])
            best = left[:, :rank] * values[:rank] @ right[:rank]
            torch.testing.assert_close(dense[place], best)


def test_calibrated_sweeps_stay_exact_and_lower_the_error() -> None:
    inputs = gaussian(300, 18, seed=3) @ gaussian(18, 18, seed=4)
    planted = BlockLowRank(gaussian(3, 2, 13), gaussian(2, 2, 18, seed=1))
    found = BlockLowRank.from_dense(planted.to_dense(), planted.relative_flops, blocks=(2, 3), calibration=inputs)
    torch.testing.assert_close(found.to_dense(), planted.to_dense())
    weight = gaussian(13, 18, seed=5)
    coupled = BlockLowRank.from_dense(weight, 0.6, blocks=(2, 3), calibration=inputs).to_dense()
    apart = torch.block_diag(*[inputs.T[part] @ inputs[:, part] for part in (slice(6), slice(6, 12), slice(12, 18))])
    uncoupled = BlockLowRank.from_dense(weight, 0.6, blocks=(2, 3), calibration=apart).to_dense()
    errors = [float(torch.linalg.norm(inputs @ (weight - found).T)) for found in (coupled, uncoupled)]
    assert errors[0] < errors[1]


def test_full_rank_blocks_are_exact() -> None:
    weight = gaussian(8, 8)
    # A block row of one row costs its width and one entry per block: dense is not reached within the dense cost.
    matrix = BlockLowRank.from_dense(torch.kron(torch.eye(2, dtype=torch.float64), weight), 1.0, blocks=(2, 2))
    assert matrix.rank == 4
    low = gaussian(8, 4) @ gaussian(4, 8, seed=1)
    target = torch.kron(torch.eye(2, dtype=torch.float64), low)
    torch.testing.assert_close(BlockLowRank.from_dense(target, 1.0, blocks=2).to_dense(), target)


def test_monarch_is_two_block_diagonal_factors_and_a_shuffle() -> None:
    # Dao et al. 2022, Definition 3.1: M = P L P^T R for n = b^2.
    b = 4
    left, right = gaussian(b, b, b), gaussian(b, b, b, seed=1)
    shuffle = torch.arange(b * b).view(b, b).T.flatten()  # P moves (i, j) to (j, i)
    permutation = torch.eye(b * b, dtype=torch.float64)[shuffle]
    published = permutation @ torch.block_diag(*left) @ permutation.T @ torch.block_diag(*right)
    found = Monarch.from_dense(published, 2 * b**3 / b**4)
    assert found.stored == 2 * b**3
    torch.testing.assert_close(found.to_dense(), published)


def test_monarch_block_count_comes_from_the_budget() -> None:
    weight = gaussian(64, 64)
    for count in (4, 8, 16):
        matrix = Monarch.from_dense(weight, count * 128 / 4096)
        assert matrix.left.shape == (count, 1, 64)
    published = Monarch.from_dense(weight, 0.5, blocks=4)  # 4 blocks of 16 x 16 in both factors
    assert published.stored == 2 * 4 * 16 * 16
    with pytest.raises(ConfigError, match="8 blocks of rank 2"):
        Monarch.from_dense(weight, 0.3, blocks=8, block_rank=2)


def test_alds_error_bound_and_choice_of_parts() -> None:
    weight = torch.cat([gaussian(24, 2, seed=s) @ gaussian(2, 12, seed=s + 9) for s in range(4)], dim=1)
    # Four column blocks of rank 2: exact with four parts at 2 (4 m + n), which one part (rank 6 there) cannot be.
    matrix = Alds.from_dense(weight, 2 * (4 * 24 + 48) / (24 * 48))
    assert matrix.left.shape == (4, 2, 24)
    torch.testing.assert_close(matrix.to_dense(), weight)
    target = gaussian(24, 48)
    for parts in (1, 2, 3):
        matrix = Alds.from_dense(target, 0.6, parts=parts)
        rank = matrix.rank
        assert rank == int(0.6 * 24 * 48) // (parts * 24 + 48)
        error = torch.linalg.matrix_norm(target - matrix.to_dense(), 2) / torch.linalg.matrix_norm(target, 2)
        tails = [torch.linalg.svdvals(block)[rank] for block in target.chunk(parts, dim=1)]
        bound = parts**0.5 * max(tails) / torch.linalg.matrix_norm(target, 2)
        assert error <= bound + 1e-12


def test_alds_shares_a_budget_by_the_largest_error() -> None:
    easy = gaussian(32, 2) @ gaussian(2, 32, seed=1) + 0.01 * gaussian(32, 32, seed=2)
    weights = {"easy": easy, "hard": gaussian(32, 32, seed=3), "wide": gaussian(16, 64, seed=4)}
    budgets = Alds.budgets(weights, 0.5)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    spent = sum(budgets[name] * sizes[name] for name in weights)
    assert spent <= 0.5 * sum(sizes.values()) + 1e-6
    assert budgets["easy"] < 0.2 < budgets["hard"]

    def largest_error(shares: dict[str, float]) -> float:
        errors = []
        for name, weight in weights.items():
            matrix = Alds.from_dense(weight, shares[name])
            assert matrix.relative_flops <= shares[name] + 1e-9
            errors.append(
                float(torch.linalg.matrix_norm(weight - matrix.to_dense(), 2) / torch.linalg.matrix_norm(weight, 2))
            )
        return max(errors)

    assert largest_error(budgets) < largest_error(dict.fromkeys(weights, 0.5))
    packed = {"qkv": torch.cat([weights["hard"]] * 3), "easy": torch.cat([easy] * 3)}
    budgets = Alds.budgets(packed, 0.5, row_splits=dict.fromkeys(packed, 3))
    assert budgets["easy"] < 0.5 < budgets["qkv"]
    assert Alds.from_dense(packed["qkv"], budgets["qkv"], row_splits=3).relative_flops <= budgets["qkv"]
    with pytest.raises(ConfigError, match="does not pay for rank 1"):
        Alds.budgets(weights, 0.01)
