import torch

from gblr_plugin.decomposition.anchor import anchored
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix


def _lost(energy: list[float], start: int) -> float:
    n = len(energy)
    return sum(i * energy[(start + i) % n] for i in range(n))


def test_full_intervals_start_where_shrinking_loses_least() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    v = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    matrix = StructuredMatrix.from_factors(u, v)
    moved = anchored(matrix)
    for factor, intervals in ((u, moved.rows), (v, moved.cols)):
        for row, start in zip(factor.square().tolist(), intervals.start.tolist(), strict=True):
            assert _lost(row, start) <= min(_lost(row, other) for other in range(len(row))) + 1e-9
    assert torch.equal(moved.to_dense(), matrix.to_dense())
    assert moved.stored == matrix.stored


def test_starts_are_multiples_of_the_tile_and_other_intervals_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, 16, generator=generator)
    v = torch.randn(2, 16, generator=generator)
    rows = Intervals(torch.tensor([16, 5]), torch.tensor([0, 3]), 16)
    moved = anchored(StructuredMatrix.from_factors(u, v, rows), (4, 8))
    assert moved.rows.start[0] % 4 == 0
    assert moved.rows.start[1] == 3
    assert (moved.cols.start % 8 == 0).all()
