import pytest
import torch

from gblr_plugin.layers.axis_blocks import SLOPE_TOLERANCE, TOLERANCE, active_blocks, mask_reach
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.matrix.gaudi_mask import mask_tables
from gblr_plugin.matrix.structure import Intervals


@pytest.mark.parametrize("n", [64, 100, 768, 1023])
@pytest.mark.parametrize("sigma", [1.0, 10.0, 60.0, 100.0])
def test_reach_bounds_masks_and_slopes(n, sigma):
    reach = mask_reach(n, sigma)
    width = torch.tensor([0.25], dtype=torch.float64)
    mask = gaudi_mask(width, torch.zeros(1, dtype=torch.float64), n, sigma)[0]
    w = round(0.25 * n)
    index = torch.arange(n)
    outside = (index >= w + reach) & (index < n - reach)
    assert reach == n or bool(outside.any()) or w + 2 * reach >= n
    assert bool((mask[outside].abs() <= TOLERANCE).all())
    slope = mask_tables(n, sigma, torch.float64)[1, :n].abs()
    assert bool((slope[reach : n - reach] <= SLOPE_TOLERANCE * slope.max()).all())


def test_exact_boxcars_reach_everywhere_until_frozen():
    assert mask_reach(768, None) == 768


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("length", [5, 64, 200, 777])
def test_lists_hold_every_component_that_meets_the_block(length, splits):
    generator = torch.Generator().manual_seed(length)
    width = torch.randint(0, length + 1, (40,), generator=generator)
    width[0], width[1] = 0, length
    start = torch.randint(0, length, (40,), generator=generator)
    skip = torch.zeros(40, dtype=torch.bool)
    skip[5] = True
    blocks = active_blocks(width, start, length, 0, skip, splits)
    support = Intervals(width, start, length).support()
    support[5] = False
    assert [block.offset for block in blocks[:1]] == [0]
    assert sum(block.stop - block.first for block in blocks) == splits * length
    for block in blocks:
        assert block.offset % length == block.first
        wanted = support[:, block.first : block.stop].any(1)
        wanted &= torch.arange(40) // (40 // splits) == block.offset // length
        assert block.components.tolist() == wanted.nonzero().flatten().tolist()
        assert block.size == int(wanted.sum()) * (block.stop - block.first)
