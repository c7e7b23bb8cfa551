"""Matrices made of blocks on intervals are found again at their true cost."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition import decompose
from gblr_plugin.decomposition.exact import lines
from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.decomposition.recovery.shortest import shortest
from gblr_plugin.decomposition.recovery.vanishing import WindowSearch, running_sums, shortest_vectors
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.matrix.tiles import TiledAxis


def planted(size: int, count: int, seed: int, tile: int = 1) -> StructuredMatrix:
    """Blocks of random place, 3% to 40% of an axis long, with Gaussian factors."""
    g = torch.Generator().manual_seed(seed)

    def intervals() -> Intervals:
        cells = size // tile
        width = (cells * (0.03 + 0.37 * torch.rand(count, generator=g))).long().clamp(min=1)
        return Intervals(width * tile, torch.randint(cells, (count,), generator=g) * tile, size)

    u, v = (torch.randn(count, size, dtype=torch.float64, generator=g) for _ in range(2))
    return StructuredMatrix.from_factors(u, v, intervals(), intervals())


def problem(weight: torch.Tensor, max_multiply_adds: int, tile: int = 1, metric: Metric | None = None) -> Problem:
    m, n = weight.shape
    return Problem(weight, max_multiply_adds, TiledAxis(m, tile), TiledAxis(n, tile), min(m, n), metric or Metric(), 0)


def test_intervals_are_the_shortest() -> None:
    length, dim = 9, 3
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(length, dim, dtype=torch.float64, generator=g)
    rows[2:5] = rows[2:5, :1] * torch.randn(dim, dtype=torch.float64, generator=g)  # dependent neighbours
    rows[7] = 0
    rows = torch.linalg.qr(rows)[0]
    cells, starts, coefficients = shortest_vectors(rows.T, TiledAxis(length, 1), 1e-15, 1e-3)
    found = {end: at for at, end in enumerate(((starts + cells - 1) % length).tolist())}
    for end in range(length):
        # Shortest interval that ends here: the fewest indices without which the rows span no multiple of this one.
        lengths = []
        for wide in range(1, length + 1):
            outside = torch.stack([rows[(end + 1 + i) % length] for i in range(length - wide)] or [0 * rows[0]])
            both = torch.cat([outside, rows[end : end + 1]])
            if torch.linalg.matrix_rank(both) > torch.linalg.matrix_rank(outside):
                lengths.append(wide)
        assert (end in found) == bool(lengths)
        if lengths:
            at = found[end]
            assert int(cells[at]) == lengths[0]
            vector = rows @ coefficients[at]
            inside = (torch.arange(length) - starts[at]) % length < cells[at]
            assert float(vector[~inside].abs().sum()) < 1e-9
            assert float(vector[end].abs()) > 1e-3


def test_a_cell_ends_as_many_vectors_as_it_has_rows() -> None:
    """Three vectors end in the last of four cells of 2, two of them on it alone and on it and the one before."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 8, dtype=torch.float64, generator=g)
    vectors[0, :6] = 0
    vectors[1, :4] = 0
    vectors[2, 6:] = 0
    space = torch.linalg.qr(vectors.T)[0].T
    cells, starts, coefficients = shortest_vectors(space, TiledAxis(8, 2), 1e-15, 1e-3)
    last = [at for at in range(len(cells)) if (starts[at] + cells[at] - 1) % 4 == 3]
    assert sorted(cells[last].tolist()) == [1, 2, 2]
    for at in last:
        assert float((coefficients[at] @ space)[: 8 - 2 * int(cells[at])].abs().sum()) < 1e-9


@pytest.mark.parametrize(("size", "count", "tile"), [(64, 8, 1), (128, 24, 1), (192, 32, 1), (128, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_planted_blocks_are_found_at_their_true_cost(size: int, count: int, tile: int, dtype: torch.dtype) -> None:
    blocks = planted(size, count, 0, tile)
    weight = blocks.to_dense().to(dtype)
    cost = int(blocks.component_multiply_adds.sum())
    found = decompose(weight, cost / size**2, align=tile)
    assert found.stored <= cost
    assert found.num_components <= count
    assert float(torch.linalg.matrix_norm(found.to_dense() - weight) / torch.linalg.matrix_norm(weight)) < 3e-6


def test_of_two_blocks_that_end_together_none_pays_for_the_other() -> None:
    """The difference of the blocks' columns is shorter by an index, at the cost of a hull of their rows."""
    g = torch.Generator().manual_seed(0)
    weight = torch.zeros(64, 64, dtype=torch.float64)
    for rows, cols in ((slice(0, 10), slice(5, 20)), (slice(40, 50), slice(8, 20))):
        u, v = (torch.randn(part.stop - part.start, dtype=torch.float64, generator=g) for part in (rows, cols))
        weight[rows, cols] += torch.outer(u, v)
    found = shortest(problem(weight, 10 + 15 + 10 + 12))
    assert found is not None
    assert found.stored == 10 + 15 + 10 + 12


def test_blocks_on_a_grid_stay_on_it() -> None:
    blocks = planted(64, 6, 0, tile=4)
    task = problem(blocks.to_dense(), int(blocks.component_multiply_adds.sum()), tile=4)
    found = shortest(task)
    assert found is not None
    for part in (found.rows, found.cols):
        assert bool((part.width % 4 == 0).all())
        assert bool((part.start % 4 == 0).all())
    assert task.error(found) < 1e-7


def test_low_rank_without_structure_costs_what_trapezoids_cost() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(40, 5, dtype=torch.float64, generator=g),
        torch.randn(5, 30, dtype=torch.float64, generator=g),
    )
    task = problem(left @ right, 40 * 30)
    found = shortest(task)
    assert found is not None
    assert int(found.component_multiply_adds.sum()) == int(task.trapezoid_cost()[5])
    assert task.error(found) < 1e-7


def test_exact_in_a_metric_too() -> None:
    blocks = planted(48, 5, 3)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 48, dtype=torch.float64, generator=g)
    cost = int(blocks.component_multiply_adds.sum())
    found = shortest(problem(blocks.to_dense(), cost, metric=Metric.from_moment(x.T @ x / 200)))
    assert found is not None
    torch.testing.assert_close(found.to_dense(), blocks.to_dense(), atol=1e-7, rtol=1e-6)


def test_none_where_rank_or_cost_is_too_high() -> None:
    blocks = planted(48, 5, 0)
    cost = int(blocks.component_multiply_adds.sum())
    assert shortest(problem(blocks.to_dense(), cost // 2)) is None
    assert shortest(problem(torch.randn(12, 12, dtype=torch.float64), 144)) is None
    assert shortest(problem(torch.zeros(12, 12, dtype=torch.float64), 144)) is None


def test_full_width_columns_of_blocks_of_rows_are_found() -> None:
    """The columns alone look like low rank without structure; the rows tell."""
    g = torch.Generator().manual_seed(0)
    rows = torch.block_diag(*(torch.randn(10, 1, dtype=torch.float64, generator=g) for _ in range(4)))
    weight = rows @ torch.randn(4, 30, dtype=torch.float64, generator=g)
    for turned in (weight, weight.T):
        task = problem(turned, 4 * (10 + 30))
        found = shortest(task)
        assert found is not None
        assert found.stored <= task.max_multiply_adds
        assert task.error(found) < 1e-7


def test_a_tile_larger_than_the_axis_costs_no_more_than_the_axis() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.zeros(5, 60, dtype=torch.float64)
    for cols in (slice(0, 12), slice(30, 42)):
        weight[:, cols] = torch.outer(*(torch.randn(n, dtype=torch.float64, generator=g) for n in (5, 12)))
    task = Problem(weight, 2 * (5 + 12), TiledAxis(5, 64), TiledAxis(60, 3), 5, Metric(), 0)
    found = shortest(task)
    assert found is not None
    assert task.error(found) < 1e-7


def test_nothing_is_searched_where_no_rank_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values that fall evenly past the rounding: each basis would be of a space cut anywhere."""

    def never(*_: object) -> None:
        raise AssertionError("searched")

    x = torch.linspace(0, 1, 40, dtype=torch.float64)
    task = problem(torch.exp(-3 * (x[:, None] - x).square()), 800)
    monkeypatch.setattr("gblr_plugin.decomposition.recovery.shortest._basis", never)
    assert shortest(task) is None


def test_windows_are_the_longest() -> None:
    """Against windows of every start and length, decided by ranks."""
    length = 12
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(5, length, dtype=torch.float64, generator=g)
    factors[4, 9:] = factors[1, 9:] - 2 * factors[2, 9:]  # with the others cancelled on a window that wraps
    factors[4, :4] = factors[1, :4] - 2 * factors[2, :4]
    factors[3, 2:9] = 0
    factors = factors / torch.linalg.vector_norm(factors, dim=1, keepdim=True)
    members = torch.tensor([[0, 1, 2, 4], [1, 2, 0, 3], [0, 1, 2, 3]])
    there = torch.tensor([[True] * 4, [True, False, False, True], [False, False, False, True]])
    grid = TiledAxis(length, 1)
    search = WindowSearch(running_sums(factors, grid), members, there, 1e-6, 1 << 40)
    start, found = search.longest(torch.zeros(3, dtype=torch.int64))

    def cancelled(row: int, begin: int, cells: int) -> bool:
        inside = (torch.arange(length) - begin) % length < cells
        window = factors[members[row][there[row]]][:, inside]
        return bool(torch.linalg.matrix_rank(window, atol=1e-9) == torch.linalg.matrix_rank(window[:-1], atol=1e-9))

    for row in range(3):
        best = max(cells for cells in range(1, length) for begin in range(length) if cancelled(row, begin, cells))
        assert int(found[row]) == best
        assert cancelled(row, int(start[row]), best)
    none = search.longest(found)
    assert none[0].tolist() == [-1, -1, -1]
    assert torch.equal(none[1], found)
    limited = WindowSearch(running_sums(factors, grid), members, there, 1e-6, 0)
    assert limited.longest(torch.zeros(3, dtype=torch.int64))[0].tolist() == [-1, -1, -1]


def test_one_tile_may_be_far_larger_than_the_matrix() -> None:
    """Nothing is as large as the tile."""
    g = torch.Generator().manual_seed(0)
    weight = torch.outer(*(torch.randn(n, dtype=torch.float64, generator=g) for n in (6, 9)))
    found = decompose(weight, 15 / 54, align=1 << 40)
    assert found.stored == 15
    torch.testing.assert_close(found.to_dense(), weight)


@pytest.mark.parametrize(("height", "width", "shift"), [(8, 8, 0), (4, 12, 3), (12, 4, 0)])
def test_dense_blocks_cost_their_area_and_shorter_side(height: int, width: int, shift: int) -> None:
    """A matrix of full rank, made of blocks on the diagonal (or beside it, around the edge)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.block_diag(*[torch.randn(height, width, generator=g) for _ in range(4)]).roll(shift, 1)
    cost = 4 * (height * width + min(height, width))
    found = decompose(weight, cost / weight.numel())
    assert found.stored <= cost
    assert torch.equal(found.to_dense(), weight)
    assert found.num_components == 4 * min(height, width)


def test_lines_keep_to_tiles_and_components() -> None:
    weight = torch.block_diag(*[torch.randn(6, 6, dtype=torch.float64) for _ in range(3)])
    assert lines(problem(weight, 3 * 42, tile=2)) is None
    few = Problem(weight, 18 * 18, TiledAxis(18, 1), TiledAxis(18, 1), 17, Metric(), 0)
    assert lines(few) is None
    mixed = Problem(weight, 18 * 18, TiledAxis(18, 1), TiledAxis(18, 4), 18, Metric(), 0)
    found = lines(mixed)
    assert found is not None
    assert bool((found.cols.width % 4 == 0).logical_or(found.cols.width == 18).all())
    assert torch.equal(found.to_dense(), weight)
