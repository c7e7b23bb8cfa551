"""Windows that components of a low-rank product leave out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gblr_plugin import decompose
from gblr_plugin.decomposition.effort import Effort
from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.decomposition.pursuit import pursuit
from gblr_plugin.decomposition.windows import best_windows
from gblr_plugin.layers.dense import structured_like
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.tiles import TiledAxis
from gblr_plugin.surgery.layer_settings import LayerSettings, initial_matrix


def factor(length: int, rank: int) -> torch.Tensor:
    return torch.randn(length, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tile", [1, 8])
def test_what_is_lost_is_what_a_refit_loses(tile: int) -> None:
    a = factor(96, 18)
    found = best_windows(a, TiledAxis(96, tile), min_gain=0.5)
    assert found is not None
    support = found.spans.support()
    assert torch.equal(found.factor, found.factor * support)
    # Rows of `a` fitted by the directions that each index keeps, of which `factor` holds the projections.
    directions = torch.linalg.lstsq(a, torch.zeros_like(a)).solution.new_zeros(18, 18)
    for k in range(18):
        directions[:, k] = torch.linalg.lstsq(a[support[k]], found.factor[k][support[k]][:, None]).solution[:, 0]
    dual = torch.linalg.inv(directions)
    lost = 0.0
    for row, kept in zip(a, support.T, strict=True):
        basis = dual[kept]
        lost += float((row - torch.linalg.lstsq(basis.T, row[:, None]).solution[:, 0] @ basis).square().sum())
    saved = int((~support).sum())
    assert found.net == pytest.approx(0.5 * saved - lost, rel=1e-5)


def test_a_whole_tile_of_zeros_costs_nothing() -> None:
    found = best_windows(factor(64, 10), TiledAxis(64, 8), min_gain=1e-3)
    assert found is not None
    assert int((~found.spans.support()).sum()) == 10 * 8  # trapezoids on this grid leave out 32 entries in all
    assert found.net == pytest.approx(0.08, rel=1e-6)


def test_no_windows_where_intervals_cannot_wrap() -> None:
    assert best_windows(factor(65, 9), TiledAxis(65, 8), min_gain=1.0) is None


@pytest.mark.parametrize("tile", [1, 16])
def test_windows_beat_trapezoids(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = factor(128, 128)
    problem = Problem(weight, 128 * 32, TiledAxis(128, tile), TiledAxis(128, tile), 128, Metric(), 0)
    with_windows = problem.error(pursuit(problem, Effort(rank_share=0.7, rounds=3)))
    monkeypatch.setattr("gblr_plugin.decomposition.windows.best_windows", lambda *_: None)
    assert with_windows < 0.995 * problem.error(pursuit(problem, Effort(rank_share=0.7, rounds=3)))


def test_what_is_trained_keeps_its_low_rank_part_whole() -> None:
    weight = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = LayerSettings("gblr", budget=0.5)
    started = initial_matrix(weight, settings)
    assert not torch.equal(started.to_dense(), decompose(weight, 0.5).to_dense())
    layer = structured_like(nn.Linear(64, 64, dtype=torch.float64), started)
    assert layer.use_low_rank_form() > 10  # there is a low-rank part in it
    error = torch.linalg.matrix_norm
    assert error(weight - decompose(weight, 0.5).to_dense()) < error(weight - started.to_dense())
