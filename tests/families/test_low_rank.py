from __future__ import annotations

import pytest
import torch

from gblr_plugin.families.low_rank import LowRank


def test_svd_is_the_best_low_rank_matrix() -> None:
    weight = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = LowRank.from_dense(weight, 0.5)
    rank = 300 // 50
    assert matrix.left.shape == (20, rank)
    assert matrix.stored == rank * 50
    tail = torch.linalg.svdvals(weight)[rank:]
    assert torch.linalg.norm(weight - matrix.to_dense()) == pytest.approx(float(tail.norm()))


def test_calibrated_svd_is_the_best_for_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, dtype=torch.float64, generator=generator)
    inputs = torch.randn(200, 16, dtype=torch.float64, generator=generator)
    inputs = inputs * torch.logspace(0, -1, 16, dtype=torch.float64)
    matrix = LowRank.from_dense(weight, 0.5, calibration=inputs)
    tail = torch.linalg.svdvals(inputs @ weight.T)[matrix.left.shape[1] :]
    # Up to the damping of the moment, 1e-3 of its mean diagonal.
    assert torch.linalg.norm(inputs @ (weight - matrix.to_dense()).T) == pytest.approx(float(tail.norm()), rel=1e-2)
