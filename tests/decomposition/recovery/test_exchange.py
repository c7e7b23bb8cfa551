"""Exchanges between components: the product stays, the cost falls, and intervals hold what they should."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition.recovery.exchange import Exchange, Side
from gblr_plugin.matrix.tiles import TiledAxis


def held(start: int, cells: int, count: int) -> set[int]:
    return {(start + i) % count for i in range(cells)}


def test_growth_is_that_of_the_smallest_interval_around_both() -> None:
    count = 7
    g = torch.Generator().manual_seed(0)
    cells, start = (torch.randint(low, count + low, (12,), generator=g) for low in (1, 0))
    side = Side(torch.zeros(12, count), cells, start, TiledAxis(count, 1))
    growth = side.growth()
    for one in range(12):
        for other in range(12):
            both = held(int(start[one]), int(cells[one]), count) | held(int(start[other]), int(cells[other]), count)
            smallest = min(w for w in range(1, count + 1) for s in range(count) if both <= held(s, w, count))
            assert int(cells[one]) + int(growth[one, other]) == smallest
            after = Side(side.factors, cells.clone(), start.clone(), side.grid)
            after.hold(one, other)
            assert int(after.cells[one]) == smallest
            assert both <= held(int(after.start[one]), smallest, count)


def chained(tile: int, most_work: int = 1 << 40) -> Exchange:
    """Twelve blocks whose columns end in pairs, with shorter columns, which cost rows more than they save."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.zeros(12, 48, dtype=torch.float64) for _ in range(2))
    for k in range(12):
        for factor, begin, end in ((u[k], 4 * k - k % 3, 4 * k + 4), (v[k], 2 * (k // 2) + k % 2, 30 + 3 * (k // 2))):
            begin = max(0, begin)
            factor[begin:end] = torch.randn(end - begin, dtype=torch.float64, generator=g)
    mixed = v.clone()
    for k in range(0, 12, 2):
        last = 29 + 3 * (k // 2)
        mixed[k] -= v[k, last] / v[k + 1, last] * v[k + 1]
        mixed[k, last] = 0
    target = u.T @ v
    cols = Side.of(mixed, TiledAxis(48, tile), 1e-9)
    rows = torch.linalg.lstsq(cols.factors.T, target.T).solution
    return Exchange(rows, cols, target, TiledAxis(48, tile), 1e-5, most_work)


@pytest.mark.parametrize("tile", [1, 3])
def test_the_product_stays_and_the_cost_falls(tile: int) -> None:
    exchange = chained(tile)
    before = exchange.cost()
    exchange.run()
    assert exchange.cost() < before
    torch.testing.assert_close(exchange.rows.factors.T @ exchange.cols.factors, exchange.target, rtol=0, atol=1e-6)
    for side in (exchange.rows, exchange.cols):
        assert float(side.factors[~side.spans().support()].abs().max()) < 1e-9


def test_work_beyond_the_limit_ends_it() -> None:
    short, long = chained(1, 0), chained(1)
    short.run()
    long.run()
    assert short.work < long.work
    assert short.cost() >= long.cost()
    torch.testing.assert_close(short.rows.factors.T @ short.cols.factors, short.target, rtol=0, atol=1e-6)
