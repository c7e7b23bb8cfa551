"""Trapezoids: the same product for fewer multiply-adds."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.decomposition.trapezoid import least_error, trapezoid
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.tiles import TiledAxis
from gblr_plugin.matrix.trapezoid_form import lu_no_pivot, trapezoid_form


def problem(m: int, n: int, max_multiply_adds: int, tile: int = 1, seed: int = 0) -> Problem:
    weight = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Problem(weight, max_multiply_adds, TiledAxis(m, tile), TiledAxis(n, tile), min(m, n), Metric(), 0)


@pytest.mark.parametrize("size", [1, 5, 32, 45, 70])
def test_lu_multiplies_back_without_row_exchanges(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64) + 3 * torch.eye(size, dtype=torch.float64)
    lower, upper = lu_no_pivot(matrix, block=8)
    torch.testing.assert_close(lower @ upper, matrix, atol=1e-8, rtol=1e-8)
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize(("m", "n", "rank", "tile"), [(30, 20, 7, 1), (20, 33, 20, 1), (32, 48, 13, 8), (30, 44, 9, 8)])
def test_gauge_keeps_the_product_at_the_stated_cost(m: int, n: int, rank: int, tile: int) -> None:
    task = problem(m, n, m * n, tile)
    g = torch.Generator().manual_seed(1)
    left = torch.randn(m, rank, dtype=torch.float64, generator=g)
    right = torch.randn(rank, n, dtype=torch.float64, generator=g)
    gauged = trapezoid_form(left, right, task.rows, task.cols)
    assert gauged is not None
    torch.testing.assert_close(gauged.to_dense(), left @ right, atol=1e-8, rtol=1e-8)
    assert gauged.component_multiply_adds.sum() == int(task.trapezoid_cost()[rank])
    if tile == 1:
        assert int(gauged.component_multiply_adds.sum()) == rank * (m + n) - rank * (rank - 1)
    torch.testing.assert_close(gauged.u.norm(dim=1), gauged.v.norm(dim=1))


def test_gauge_refuses_vanishing_minors() -> None:
    """The first component is zero in every column at which the triangle may start."""
    task = problem(16, 16, 256)
    left = torch.zeros(16, 2, dtype=torch.float64)
    left[[8, 9], [0, 1]] = 1.0
    right = torch.eye(2, dtype=torch.float64).flip(0).repeat(1, 8)
    assert trapezoid_form(left, right, task.rows, task.cols) is None


def test_fallback_is_the_svd_of_equal_cost() -> None:
    weight = torch.block_diag(torch.zeros(8, 8), torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    task = Problem(weight.double(), 128, TiledAxis(16, 1), TiledAxis(16, 1), 16, Metric(), 0)
    found = trapezoid(task)
    values = torch.linalg.svdvals(weight.double())
    assert found.stored <= 128
    assert task.error(found) <= float((values[4:].square().sum() / values.square().sum()).sqrt()) + 1e-9


def test_trapezoid_is_the_best_low_rank_matrix_of_its_rank() -> None:
    task = problem(40, 24, 480)
    found = trapezoid(task)
    rank = found.num_components
    assert rank * 64 - rank * (rank - 1) <= 480 < (rank + 1) * 64 - (rank + 1) * rank
    values = torch.linalg.svdvals(task.weight)
    expected = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    assert task.error(found) == pytest.approx(expected, rel=1e-9)


def test_least_error_is_that_of_the_trapezoids() -> None:
    task = problem(40, 30, 500)
    assert task.error(trapezoid(task)) == pytest.approx(least_error(task), rel=1e-9)
