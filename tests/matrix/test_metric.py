"""The norm of an output error."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition import decompose
from gblr_plugin.errors import ConfigError
from gblr_plugin.matrix.metric import Metric


def test_norm_is_the_output_error_over_the_samples() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64, generator=g)
    error = torch.randn(4, 6, dtype=torch.float64, generator=g)
    metric = Metric.from_moment(x.T @ x / 200, damping=0.0)
    assert metric.norm(error) ** 2 == pytest.approx(float((x @ error.T).square().sum() / 200))
    torch.testing.assert_close(metric.unwhiten(metric.whiten(error)), error)
    assert Metric().norm(error) == pytest.approx(float(torch.linalg.norm(error)))


def test_relative_error_of_zero() -> None:
    assert Metric().relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert Metric().relative_error(torch.eye(2), torch.zeros(2, 2)) == pytest.approx(1.0)


def test_moments_that_are_none() -> None:
    with pytest.raises(ConfigError, match="zero"):
        Metric.from_moment(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="positive"):
        Metric.from_moment(torch.diag(torch.tensor([5.0, -4.0, 1.0])))


def test_outputs_weighed_by_gradients_give_the_best_low_rank_of_the_second_order_loss() -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 10, dtype=torch.float64, generator=g)
    x = torch.randn(200, 10, dtype=torch.float64, generator=g) * torch.linspace(0.1, 3, 10)
    slopes = torch.randn(200, 12, dtype=torch.float64, generator=g) * torch.linspace(3, 0.1, 12)
    metric = Metric.from_moment(x.T @ x / 200).weighted(slopes.T @ slopes)
    assert metric.row_root is not None
    assert metric.root is not None
    best = torch.linalg.svdvals(metric.row_root.T @ weight @ metric.root)
    for method, cost in (("svd", 4 * 22), ("trapezoid", 4 * 22 - 12)):
        found = decompose(weight, cost / 120, method=method, calibration=metric)
        assert found.stored == cost
        assert metric.norm(weight - found.to_dense()) == pytest.approx(float(best[4:].square().sum().sqrt()), rel=1e-6)
    split = decompose(weight, 2 * 3 * 16 / 120, method="svd", calibration=metric, row_splits=2)
    half = decompose(weight[6:], 3 * 16 / 60, method="svd", calibration=metric.for_rows(6, 12))
    torch.testing.assert_close(split.to_dense()[6:], half.to_dense())
    errors = [
        metric.norm(weight - decompose(weight, 0.5, method=name, calibration=metric).to_dense())
        for name in ("pursuit", "trapezoid", "gblr")
    ]
    assert errors[2] == min(errors[:2])
    assert metric.weighted(torch.zeros(12, 12)) is metric


def test_an_indefinite_moment_is_not_called_zero() -> None:
    with pytest.raises(ConfigError, match="the second moment is not positive semi-definite"):
        Metric.from_moment(torch.diag(torch.tensor([1.0, -1.0])))
