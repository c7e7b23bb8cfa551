"""Singular triplets agree with their definition, and truncated they give the best matrix of a rank."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.matrix import svd
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.svd import singular_triplets, truncated_svd


@pytest.mark.parametrize("gram_from", [1, 1000])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_triplets(gram_from: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "GRAM_FROM", gram_from)
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = singular_triplets(matrix)
    torch.testing.assert_close((left * values) @ right, matrix)
    torch.testing.assert_close(left.T @ left, torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix))


def test_what_is_lost_in_a_metric_is_the_energy_of_the_other_singular_values() -> None:
    g = torch.Generator().manual_seed(0)
    weight, inputs, slopes = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((8, 6), (50, 6), (50, 8)))
    metric = Metric.from_moment(inputs.T @ inputs).weighted(slopes.T @ slopes)
    left, right = truncated_svd(weight, 3, metric)
    values = torch.linalg.svdvals(metric.whiten_rows(metric.whiten(weight)))
    lost = metric.norm(weight - left @ right)
    assert lost == pytest.approx(float(values[3:].square().sum().sqrt()))
