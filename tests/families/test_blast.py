from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gblr_plugin.families.blast import Blast
from gblr_plugin.families.low_rank import LowRank


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_blocks_share_bases_and_differ_in_a_diagonal() -> None:
    matrix = Blast(gaussian(3, 8), gaussian(3, 10, seed=1), gaussian(3, 2, 2, seed=2))
    dense = matrix.to_dense()
    assert matrix.stored == 3 * (8 + 10 + 4)
    for i in range(2):
        for j in range(2):
            u, v = matrix.left[:, 4 * i : 4 * i + 4], matrix.right[:, 5 * j : 5 * j + 5]
            block = u.T @ torch.diag(matrix.coupling[:, i, j]) @ v
            torch.testing.assert_close(dense[4 * i : 4 * i + 4, 5 * j : 5 * j + 5], block)


def test_one_block_is_low_rank() -> None:
    weight = gaussian(16, 12)
    matrix = Blast.from_dense(weight, 5 * 29 / 192, blocks=1)
    low = LowRank.from_dense(weight, 5 * 28 / 192)
    torch.testing.assert_close(matrix.to_dense(), low.to_dense())


def test_sweeps_never_raise_the_error_and_beat_low_rank() -> None:
    weight = gaussian(40, 56)
    errors = [
        float(torch.linalg.norm(weight - Blast.from_dense(weight, 0.5, blocks=4, iterations=steps).to_dense()))
        for steps in (1, 3, 10, 30, 60)
    ]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[-1] < float(torch.linalg.norm(weight - LowRank.from_dense(weight, 0.5).to_dense()))


def test_factors_are_balanced() -> None:
    matrix = Blast.from_dense(gaussian(24, 32), 0.5)
    torch.testing.assert_close(matrix.left.norm(dim=1), matrix.right.norm(dim=1))
    torch.testing.assert_close(matrix.coupling.square().mean((1, 2)), torch.ones(len(matrix.left), dtype=torch.float64))


def test_calibrated_sweeps_never_raise_the_output_error_and_beat_low_rank() -> None:
    inputs = gaussian(300, 31, seed=1) * torch.logspace(0, -1, 31, dtype=torch.float64)
    inputs = inputs @ torch.linalg.qr(gaussian(31, 31, seed=2))[0]
    weight = gaussian(22, 31)
    # Errors in the damped metric, which is what the sweeps lower.
    moment = inputs.T @ inputs / 300
    damped = moment + 1e-3 * moment.diagonal().mean() * torch.eye(31, dtype=torch.float64)

    def error(matrix: Tensor) -> float:
        gap = weight - matrix
        return float((gap @ damped * gap).sum())

    errors = [
        error(Blast.from_dense(weight, 0.6, blocks=3, iterations=steps, calibration=inputs).to_dense())
        for steps in (1, 2, 5, 10, 30)
    ]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[-1] < error(LowRank.from_dense(weight, 0.6, calibration=inputs).to_dense())
