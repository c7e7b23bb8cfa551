"""The norm of an output error."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition.metric import Metric
from gblr_plugin.errors import ConfigError


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
