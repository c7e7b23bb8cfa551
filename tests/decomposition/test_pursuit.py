"""Interval pursuit: better than trapezoids, on grids, in a metric, on structure that is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gblr_plugin.decomposition.effort import Effort
from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.decomposition.pursuit import finished, pursuit
from gblr_plugin.decomposition.spans import Spans
from gblr_plugin.decomposition.state import State
from gblr_plugin.decomposition.trapezoid import trapezoid
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.tiles import TiledAxis


def problem(m: int, n: int, budget: float, tile: int = 1, metric: Metric | None = None) -> Problem:
    weight = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Problem(
        weight, int(budget * m * n), TiledAxis(m, tile), TiledAxis(n, tile), min(m, n), metric or Metric(), 0
    )


@pytest.mark.parametrize("budget", [0.25, 0.5])
@pytest.mark.parametrize("shape", [(96, 96), (64, 96)])
def test_beats_trapezoids_of_equal_cost(budget: float, shape: tuple[int, int]) -> None:
    task = problem(*shape, budget)
    found = pursuit(task)
    assert found.stored <= task.max_multiply_adds
    assert found.num_components <= task.max_components
    assert task.error(found) < 0.97 * task.error(trapezoid(task))


def test_aligned_pursuit_keeps_to_the_grid() -> None:
    task = problem(96, 96, 0.5, tile=8)
    found = pursuit(task)
    for part in (found.rows, found.cols):
        assert bool((part.width % 8 == 0).all())
        assert bool((part.start % 8 == 0).all())
    assert found.stored <= task.max_multiply_adds
    assert task.error(found) < task.error(trapezoid(task))


def test_more_polish_never_hurts() -> None:
    task = problem(64, 64, 0.3)
    errors = [task.error(pursuit(task, Effort(polish=polish))) for polish in (0, 6)]
    assert errors[1] <= errors[0]


def test_metric_counts_only_where_inputs_are() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(300, 64, dtype=torch.float64, generator=g)
    x[:, 32:] *= 1e-2
    task = problem(64, 64, 0.25, metric=Metric.from_moment(x.T @ x / 300))
    plain = problem(64, 64, 0.25)
    assert task.error(pursuit(task)) < 0.8 * task.error(pursuit(plain))


@pytest.mark.parametrize(("trains", "least", "most"), [(False, 1000.0, float("inf")), (True, 0.0, 50.0)])
def test_factors_that_will_be_trained_do_not_cancel(trains: bool, least: float, most: float) -> None:
    task = replace(problem(64, 64, 0.3), trains=trains)
    # Two components on two rows, almost parallel: any mixture of them fits these rows as well.
    u = torch.zeros(2, 64, dtype=torch.float64)
    u[0, :2], u[1, :2] = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0 + 1e-4])
    v = torch.ones(2, 64, dtype=torch.float64)
    v[0, ::2] = 1 + 1e-4
    rows = Spans(torch.tensor([2, 2]), torch.tensor([0, 0]), task.rows)
    cols = Spans(torch.tensor([64, 64]), torch.tensor([0, 0]), task.cols)
    none = torch.zeros(64, 0, dtype=torch.float64)
    state = State(u, v, rows, cols, none, none.T, v, torch.ones(2, dtype=torch.float64))
    found = finished(task, state, 0, True)
    assert found is not None
    size = (found.u.abs().amax(1) * found.v.abs().amax(1)).max() / task.weight[:2].abs().max()
    assert least < float(size) < most
    assert float((found.to_dense() - task.weight)[:2].norm() / task.weight[:2].norm()) < 0.7


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_few_components(limit: int) -> None:
    weight = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = Problem(weight, 400, TiledAxis(32, 1), TiledAxis(32, 1), limit, Metric(), 0)
    found = pursuit(task)
    assert found.num_components <= limit
    assert found.stored <= 400
