"""Moments, corrected targets and biases against their definitions."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.calibration.moments import Moments, corrected_target, output_shift
from gblr_plugin.errors import ConfigError
from gblr_plugin.matrix.metric import Metric


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 10, 7, generator=g) + 1000.0
    return x0, x0 + 0.1 * torch.randn(6, 10, 7, generator=g)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_moments_are_those_of_all_samples(
    pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    x0, x1 = (x.to(dtype) for x in pair)
    moments = Moments(7)
    for a, b in zip(x0.split(2), x1.split(2), strict=True):
        moments.add(a, b)
    a, b = x0.reshape(-1, 7).double(), x1.reshape(-1, 7).double()
    assert moments.count == 60
    torch.testing.assert_close(moments.mean, (a.mean(0), b.mean(0)))
    cross, square = moments.second()
    torch.testing.assert_close(cross, (a - a.mean(0)).T @ (b - b.mean(0)) / 60, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(square, torch.cov(b.T, correction=0), atol=tolerance, rtol=tolerance)
    cross, square = moments.second(centred=False)
    torch.testing.assert_close(cross, a.T @ b / 60)
    torch.testing.assert_close(square, b.T @ b / 60)


def test_mask_leaves_samples_out(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, _ = pair
    mask = torch.zeros(6, 10, dtype=torch.int64)
    mask[:, :4] = 1
    masked, kept = Moments(7), Moments(7)
    masked.add(x0, mask=mask)
    kept.add(x0[:, :4])
    assert masked.count == 24
    torch.testing.assert_close(masked.second()[1], kept.second()[1])
    empty = Moments(7)
    empty.add(x0, mask=torch.zeros(6, 10))
    with pytest.raises(ConfigError, match="no samples"):
        empty.second()


def test_bad_inputs(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, x1 = pair
    with pytest.raises(ConfigError, match="features"):
        Moments(8).add(x0)
    with pytest.raises(ConfigError, match="shape"):
        Moments(7).add(x0, x1[:3])
    with pytest.raises(ConfigError, match="mask"):
        Moments(7).add(x0, mask=torch.ones(5))
    with pytest.raises(ConfigError, match="NaN"):
        Moments(7).add(torch.full((2, 7), float("nan")))


def test_target_and_bias_are_the_least_squares_solution() -> None:
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(4000, 5, dtype=torch.float64, generator=g) + 2.0
    x1 = x0 @ (torch.eye(5) + 0.3 * torch.randn(5, 5, generator=g)).double() + 0.5
    x1 += 0.3 * torch.randn(4000, 5, dtype=torch.float64, generator=g)
    weight, bias = torch.randn(3, 5, dtype=torch.float64, generator=g), torch.randn(3, dtype=torch.float64, generator=g)
    moments = Moments(5)
    moments.add(x0, x1)
    cross, square = moments.second()
    target = corrected_target(weight, cross, Metric.from_moment(square, 1e-12))
    new_bias = bias + output_shift(weight, target, *moments.mean)
    design = torch.cat([x1, torch.ones(4000, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, x0 @ weight.T + bias).solution
    torch.testing.assert_close(target, expected[:5].T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(new_bias, expected[5], atol=1e-6, rtol=1e-6)


def test_unchanged_inputs_keep_the_target() -> None:
    moments = Moments(5)
    moments.add(torch.randn(50, 5))
    cross, square = moments.second()
    weight = torch.randn(4, 5)
    torch.testing.assert_close(corrected_target(weight, cross, Metric.from_moment(square)), weight.double())
