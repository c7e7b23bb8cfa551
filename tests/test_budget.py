import math

import pytest
import torch

from gblr_plugin.budget import AxisSpec, WidthBudget
from gblr_plugin.errors import ConfigError
from gblr_plugin.mask import gaudi_mask
from gblr_plugin.proximal import prox_and_clip_
from gblr_plugin.structure import multiply_adds


def spec(m, n, num=None, align=(1, 1)):
    return AxisSpec((m, n), align, num or min(m, n), m * n)


def draw(specs, seed=0, low=0.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (1 - low) * torch.rand(2, sum(s.num_components for s in specs), generator=generator)


def counted(specs, widths):
    """Multiply-adds per layer, by counting ones in exact boxcars."""
    costs = []
    for part, s in zip(widths.split([s.num_components for s in specs], dim=1), specs, strict=True):
        sides = [
            gaudi_mask(part[i], torch.zeros_like(part[i]), s.axis_lengths[i], None, align=s.align[i]).count_nonzero(1)
            for i in (0, 1)
        ]
        costs.append(int(torch.where((sides[0] > 0) & (sides[1] > 0), sides[0] + sides[1], 0).sum()))
    return costs


def apply_thresholds(specs, widths, thresholds):
    parts = [part.clone() for part in widths.split([s.num_components for s in specs], dim=1)]
    prox_and_clip_(parts, [torch.zeros_like(part) for part in parts], thresholds)
    return torch.cat(parts, dim=1)


SPECS = [spec(16, 24), spec(64, 32), spec(10, 7, align=(4, 4)), spec(33, 31, num=5, align=(1, 3))]


def test_cost_is_that_of_the_masks():
    for seed in range(5):
        widths = draw(SPECS, seed)
        assert WidthBudget(SPECS, [0, 0, 1, 2]).layer_cost(widths).tolist() == counted(SPECS, widths)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_thresholds_meet_the_targets_exactly_counted(share):
    groups = [0, 1, 0, 1]
    budget = WidthBudget(SPECS, groups)
    widths = draw(SPECS)
    start = torch.tensor(counted(SPECS, widths))
    targets = share * torch.tensor([float(start[[0, 2]].sum()), float(start[[1, 3]].sum())])
    thresholds = budget.thresholds(widths, targets)
    assert thresholds[0] == thresholds[2]
    assert thresholds[1] == thresholds[3]
    assert bool((thresholds >= 0).all())
    after = counted(SPECS, apply_thresholds(SPECS, widths, thresholds))
    costs = torch.tensor([after[0] + after[2], after[1] + after[3]])
    assert bool((costs <= targets).all())
    # It is the least such threshold, up to the resolution of the search.
    less = apply_thresholds(SPECS, widths, thresholds - 4e-6)
    before = counted(SPECS, less)
    assert before[0] + before[2] > targets[0]
    assert before[1] + before[3] > targets[1]


def test_infinite_target_leaves_a_group_alone():
    thresholds = WidthBudget(SPECS, [0, 0, 1, 1]).thresholds(draw(SPECS), torch.tensor([math.inf, 1.0]), growth=0.1)
    assert thresholds[:2].tolist() == [0.0, 0.0]
    assert bool((thresholds[2:] > 0).all())


def test_unused_budget_lets_live_widths_grow_by_at_most_growth():
    specs = [spec(32, 32)]
    widths = draw(specs) * 0.5
    budget = WidthBudget(specs, [0])
    cost = float(counted(specs, widths)[0])
    assert budget.thresholds(widths, torch.tensor([10 * cost]), growth=0.01).item() == pytest.approx(-0.01)
    assert -0.5 < budget.thresholds(widths, torch.tensor([1.1 * cost]), growth=0.5).item() < 0
    assert budget.thresholds(widths, torch.tensor([2 * cost]), growth=0.0).item() == 0.0


def test_bounds_hold_within_a_group():
    specs = [spec(32, 32), spec(32, 32), spec(32, 32)]
    widths = draw(specs)
    widths[:, :32] *= 0.2  # would be squeezed out
    dense = 1024.0
    budget = WidthBudget(specs, [0, 0, 0], lower=[0.15 * dense, 0, 0], upper=[math.inf, 0.3 * dense, math.inf])
    targets = torch.tensor([0.4 * 3 * dense])
    shrunk = apply_thresholds(specs, widths, budget.thresholds(widths, targets))
    costs = counted(specs, shrunk)
    assert costs[0] >= 0.15 * dense
    assert costs[1] <= 0.3 * dense
    assert sum(costs) <= targets.item()
    settled = budget.settle(shrunk, targets)
    final = [int(multiply_adds(*part).sum()) for part in settled.split([32, 32, 32], dim=1)]
    assert final[0] >= 0.15 * dense
    assert final[1] <= 0.3 * dense
    assert targets.item() - 1 < sum(final) <= targets.item()


def test_lower_bounds_above_the_target_win():
    specs = [spec(16, 16)]
    budget = WidthBudget(specs, [0], lower=[100.0])
    shrunk = apply_thresholds(specs, draw(specs), budget.thresholds(draw(specs), torch.tensor([20.0])))
    assert counted(specs, shrunk)[0] >= 100


def test_contradicting_bounds_are_refused():
    with pytest.raises(ConfigError, match="at least 5 and at most 4"):
        WidthBudget([spec(4, 4)], [0], lower=[5.0], upper=[4.0])


@pytest.mark.parametrize("align", [(1, 1), (4, 4), (16, 16), (3, 5)])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_settle_uses_the_target_up(align, share):
    specs = [spec(64, 48, align=align), spec(32, 80, align=align)]
    widths = draw(specs)
    budget = WidthBudget(specs, [0, 0])
    targets = torch.tensor([share * sum(s.dense for s in specs)])
    shrunk = apply_thresholds(specs, widths, budget.thresholds(widths, targets))
    settled = budget.settle(shrunk, targets)
    cost = int(multiply_adds(settled[0], settled[1]).sum())
    assert targets.item() - max(align) * 2 < cost <= targets.item()
    dead = (shrunk == 0).any(0)
    assert bool((settled[shrunk == 0] == 0).all())
    assert int(multiply_adds(settled[0], settled[1])[dead].sum()) == 0
    lengths = torch.tensor([[64.0] * 48 + [32.0] * 32, [48.0] * 48 + [80.0] * 32])
    assert torch.equal(budget.snap((settled / lengths).float()), settled)  # survives being stored as fractions


def test_settle_brings_back_what_only_rounding_emptied():
    # All widths equal, just under half a tile: every component rounds to nothing.
    specs = [spec(64, 64, align=(16, 16))]
    widths = torch.full((2, 64), 0.1249)
    budget = WidthBudget(specs, [0])
    assert counted(specs, widths) == [0]
    settled = budget.settle(widths, torch.tensor([0.25 * 4096]))
    assert int(multiply_adds(settled[0], settled[1]).sum()) == 0.25 * 4096


def test_settle_without_target_rounds():
    widths = draw(SPECS)
    budget = WidthBudget(SPECS, [0, 0, 0, 0])
    assert torch.equal(budget.settle(widths, torch.tensor([math.inf])), budget.snap(widths))


def test_settle_raises_first_what_rounding_lost_most():
    specs = [spec(10, 10, num=3)]
    widths = torch.tensor([[0.54, 0.51, 0.5], [0.5, 0.5, 0.5]])
    settled = WidthBudget(specs, [0]).settle(widths, torch.tensor([31.0]))
    assert settled.tolist() == [[6, 5, 5], [5, 5, 5]]
