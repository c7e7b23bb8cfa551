"""Maximum-sum intervals against brute force."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition import spans as module
from gblr_plugin.decomposition.spans import Spans, best_spans, cell_sums, joint_gains, longest_run
from gblr_plugin.matrix.tiles import TiledAxis


def brute_force(net: torch.Tensor, cyclic: bool) -> float:
    """Largest sum of a cyclic (or plain) interval; 0 for none."""
    n = len(net)
    sums = [0.0]
    for start in range(n):
        for width in range(1, n + 1):
            if cyclic or start + width <= n:
                sums.append(float(net[(start + torch.arange(width)) % n].sum()))
    return max(sums)


@pytest.mark.parametrize(("length", "tile"), [(12, 1), (12, 3), (11, 3), (1, 1)])
@pytest.mark.parametrize("compiled", [False, True])
def test_best_interval_is_optimal(length: int, tile: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        kernels = pytest.importorskip("gblr_plugin.kernels.cpu.numba_spans")
        monkeypatch.setattr(module, "span_kernel", lambda gains: kernels.best_spans)
    grid = TiledAxis(length, tile)
    gains = torch.rand(60, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) ** 4
    sums = cell_sums(gains, grid)
    for min_gain in (0.05, 0.2, 2.0):
        spans, net = best_spans(sums, grid, min_gain)
        for k in range(len(gains)):
            best = brute_force(sums[k] - min_gain * tile, grid.cyclic)
            assert float(net[k]) == pytest.approx(best, abs=1e-9)
            covered = (torch.arange(grid.cells) - spans.start[k]) % grid.cells < spans.cells[k]
            assert float(((sums[k] - min_gain * tile) * covered).sum()) == pytest.approx(best, abs=1e-9)


def test_widths_of_short_last_cells_are_whole_tiles_or_the_axis() -> None:
    grid = TiledAxis(11, 3)
    spans = Spans(torch.tensor([1, 2, 4, 0]), torch.tensor([3, 2, 0, 1]), grid)
    assert spans.widths().tolist() == [3, 6, 11, 0]
    support = spans.support()
    assert support.sum(1).tolist() == [3, 6, 11, 0]
    assert bool(support[0, 9:].all())
    assert bool(support[1, 6:].all())


def test_join_and_select() -> None:
    grid = TiledAxis(8, 2)
    both = Spans(torch.tensor([1]), torch.tensor([2]), grid).join(Spans(torch.tensor([3]), torch.tensor([0]), grid))
    assert both.select(torch.tensor([1])).intervals().width.tolist() == [6]
    assert both.intervals().start.tolist() == [4, 0]


@pytest.mark.parametrize(("length", "tile"), [(12, 1), (12, 3), (11, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joint_gains_are_those_of_the_formula(length: int, tile: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    inside, right, image = torch.rand(3, 7, length, generator=g, dtype=dtype)
    support, scale = torch.rand(7, length, generator=g) < 0.5, torch.rand(7, generator=g, dtype=dtype)
    grid = TiledAxis(length, tile)
    gains = torch.where(support, inside, (right - image) ** 2 * scale[:, None])
    expected = torch.stack([gains[:, c * tile : (c + 1) * tile].sum(1) for c in range(grid.cells)], 1)
    found = joint_gains(inside, right, image, support, scale, grid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_longest_run_wraps() -> None:
    active = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]]).bool()
    width, start = longest_run(active)
    assert width.tolist() == [2, 0, 6, 2]
    for k in (0, 3):
        covered = (torch.arange(6) - start[k]) % 6 < width[k]
        assert bool((active[k] | ~covered).all())
