from __future__ import annotations

import pytest
import torch
from torch import nn

from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.monitoring.pictures import colours, overlap_map, structure_image
from gblr_plugin.tensor.gblr_tensor import GBLRTensor


def random_matrix(m, n, num, splits=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def intervals(length):
        width = torch.randint(0, length + 1, (num,), generator=generator)
        return Intervals(width, torch.randint(0, length, (num,), generator=generator), length)

    factors = torch.randn(num, m // splits, generator=generator), torch.randn(num, n, generator=generator)
    return StructuredMatrix.from_factors(*factors, intervals(m // splits), intervals(n), (num // splits,) * splits)


def counted(matrix):
    """The definition: indicator outer products, summed."""
    ones = StructuredMatrix.from_factors(
        torch.ones_like(matrix.u), torch.ones_like(matrix.v), matrix.rows, matrix.cols, matrix.split_sizes
    )
    return ones.to_dense().int()


@pytest.mark.parametrize(("m", "n", "num", "splits"), [(1, 1, 1, 1), (7, 12, 9, 1), (30, 11, 24, 3), (64, 64, 200, 1)])
def test_overlap_map_counts_blocks(m, n, num, splits):
    for seed in range(5):
        matrix = random_matrix(m, n, num, splits, seed)
        got = overlap_map(matrix)
        assert got.dtype == torch.int32
        assert torch.equal(got, counted(matrix))


def test_overlap_map_of_layers_and_converted_weights():
    matrix = random_matrix(12, 10, 6, seed=3)
    expected = counted(matrix)
    assert torch.equal(overlap_map(GBLRLinear(matrix)), expected)
    assert torch.equal(overlap_map(GBLRTensor.from_structured(matrix)), expected)
    frozen = nn.Linear(10, 12)
    frozen.weight = nn.Parameter(GBLRTensor.from_structured(matrix), requires_grad=False)
    assert torch.equal(overlap_map(frozen), expected)


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), torch.zeros(3, 3), "fc"])
def test_what_has_no_structure_is_an_error(thing):
    with pytest.raises(ConfigError, match="has no structure"):
        overlap_map(thing)


def test_a_small_matrix_is_enlarged_by_whole_factors():
    matrix = random_matrix(20, 30, 8)
    picture = structure_image(matrix, 128, legend=False)
    assert picture.shape == (3, 80, 120)
    assert picture.dtype == torch.uint8
    counts = overlap_map(matrix)
    entries = colours(counts, int(counts.max())).permute(2, 0, 1)
    assert torch.equal(picture[:, 2::4, 2::4], entries)


def test_a_large_matrix_is_reduced_to_area_averages():
    matrix = random_matrix(512, 1024, 40, splits=2)
    picture = structure_image(matrix, 128, most=20, legend=False)
    average = nn.functional.avg_pool2d(counted(matrix)[None].float(), 8)[0]
    assert picture.shape == (3, 64, 128)
    difference = picture.int() - colours(average, 20).permute(2, 0, 1).int()
    assert difference.abs().max() <= 2  # one colour step, from rounding


def test_thin_blocks_of_a_large_matrix_stay_visible():
    rows = Intervals(torch.tensor([4096, 1]), torch.tensor([0, 2000]), 4096)
    cols = Intervals(torch.tensor([1, 4096]), torch.tensor([1000, 0]), 4096)
    matrix = StructuredMatrix(torch.ones(2, 4096), torch.ones(2, 4096), rows, cols, (2,))
    picture = structure_image(matrix, 512, legend=False).int()
    background = picture[:, 0, 0]
    assert (picture[:, 10, 125] - background).abs().max() >= 5
    assert (picture[:, 250, 10] - background).abs().max() >= 5


def test_thin_matrices_have_some_height_and_the_legend_only_where_it_fits():
    assert structure_image(random_matrix(2, 512, 4), 256).shape == (3, 16, 256)
    assert structure_image(random_matrix(4, 100, 4), 256).shape == (3, 16, 200)
    plain, legend = (structure_image(random_matrix(64, 64, 30), 256, legend=legend) for legend in (False, True))
    assert legend.shape[1] == plain.shape[1]
    assert legend.shape[2] > plain.shape[2]
    assert torch.equal(legend[:, :, : plain.shape[2]], plain)


def test_colours_darken_evenly_and_differ_from_empty():
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    levels = (colours(torch.arange(41), 40).float() @ weights)[1:]
    assert (levels.diff() < 0).all()
    empty, one = colours(torch.tensor([0, 1]), 40).int()
    assert (empty - one).abs().max() > 30


def test_an_empty_structure_is_all_grey():
    nothing = Intervals(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 8)
    matrix = StructuredMatrix(torch.zeros(2, 8), torch.zeros(2, 8), nothing, nothing, (2,))
    assert int(overlap_map(matrix).sum()) == 0
    picture = structure_image(matrix, 64, legend=False)
    assert (picture == picture[:, :1, :1]).all()


def test_max_size_is_checked():
    with pytest.raises(ConfigError, match="at least 16"):
        structure_image(random_matrix(4, 4, 2), 8)
