import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.learning.budget import AxisSpec, WidthBudget
from gblr_plugin.learning.proximal import prox_and_clip_
from gblr_plugin.matrix.structure import multiply_adds


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
            gaudi_mask(part[i], torch.zeros_like(part[i]), s.axis_lengths[i], None, align=s.tile[i]).count_nonzero(1)
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
    thresholds = WidthBudget(SPECS, [0, 0, 1, 1]).thresholds(draw(SPECS), torch.tensor([math.inf, 1.0]), [0.1] * 4)
    assert thresholds[:2].tolist() == [0.0, 0.0]
    assert bool((thresholds[2:] > 0).all())


def test_unused_budget_lets_live_widths_grow_by_at_most_growth():
    specs = [spec(32, 32)]
    widths = draw(specs) * 0.5
    budget = WidthBudget(specs, [0])
    cost = float(counted(specs, widths)[0])
    assert budget.thresholds(widths, torch.tensor([10 * cost]), [0.01]).item() == pytest.approx(-0.01)
    assert -0.5 < budget.thresholds(widths, torch.tensor([1.1 * cost]), [0.5]).item() < 0
    assert budget.thresholds(widths, torch.tensor([2 * cost]), [0.0]).item() == 0.0


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
    settled = budget.rounded(shrunk, targets)
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
    settled = budget.rounded(shrunk, targets)
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
    settled = budget.rounded(widths, torch.tensor([0.25 * 4096]))
    assert int(multiply_adds(settled[0], settled[1]).sum()) == 0.25 * 4096


def test_settle_without_target_rounds():
    widths = draw(SPECS)
    budget = WidthBudget(SPECS, [0, 0, 0, 0])
    assert torch.equal(budget.rounded(widths, torch.tensor([math.inf])), budget.snap(widths))


def test_settle_raises_first_what_rounding_lost_most():
    specs = [spec(10, 10, num=3)]
    widths = torch.tensor([[0.54, 0.51, 0.5], [0.5, 0.5, 0.5]])
    settled = WidthBudget(specs, [0]).rounded(widths, torch.tensor([31.0]))
    assert settled.tolist() == [[6, 5, 5], [5, 5, 5]]


def test_groups_are_counted():
    for groups, num in (([0, 1, 0, 1], 2), ([0, 0, 0, 0], 1), ([0, 1, 2, 3], 4)):
        assert WidthBudget(SPECS, groups).num_groups == num
    assert WidthBudget(SPECS, [0, 0, 0, 0]).num_components == sum(s.num_components for s in SPECS)


@pytest.mark.parametrize("align", [(1, 2), (2, 1), (3, 1), (1, 1)])
def test_cost_on_tiles_of_one_axis(align):
    specs = [spec(16, 24, align=align), spec(31, 17, align=align)]
    widths = draw(specs, 3)
    assert WidthBudget(specs, [0, 0]).layer_cost(widths).tolist() == counted(specs, widths)


def test_only_live_widths_are_counted_on_to_grow():
    specs = [spec(64, 64)]
    widths = draw(specs) * 0.4
    widths[0, ::2] = 0.0  # half of the components are dead
    widths[1, 3::8] = -0.01  # by their last step
    widths[1, 1::8] = 1.0  # some cannot grow
    budget = WidthBudget(specs, [0])
    target = 1.5 * counted(specs, widths)[0]
    threshold = budget.thresholds(widths, torch.tensor([target]), [0.9])
    assert -0.9 < threshold.item() < -0.05
    cost = counted(specs, apply_thresholds(specs, widths, threshold))[0]
    assert target - 64 < cost <= target


def test_without_growth_an_unused_budget_stays_unused():
    widths = draw([spec(32, 32)]) * 0.5
    assert WidthBudget([spec(32, 32)], [0]).thresholds(widths, torch.tensor([1e6])).item() == 0.0


def test_what_is_found_has_no_gradient():
    widths = draw(SPECS).requires_grad_()
    budget = WidthBudget(SPECS, [0, 0, 0, 0], lower=[10.0, 0, 0, 0])
    assert not budget.thresholds(widths, torch.tensor([800.0]), [0.1] * 4).requires_grad
    assert not budget.rounded(widths, torch.tensor([800.0])).requires_grad


def test_bounds_are_met_and_the_rest_of_the_target_used():
    specs = [spec(64, 64) for _ in range(4)]
    dense = 64.0 * 64
    widths = draw(specs)
    lower, upper = [0.5 * dense, 0, 0, 0.0], [math.inf, 0.1 * dense, math.inf, math.inf]
    target = 1.1 * dense
    budget = WidthBudget(specs, [0, 0, 0, 0], lower, upper)
    thresholds = budget.thresholds(widths, torch.tensor([target]))
    costs = counted(specs, apply_thresholds(specs, widths, thresholds))
    assert 0.5 * dense <= costs[0] < 0.52 * dense
    assert 0.08 * dense < costs[1] <= 0.1 * dense
    assert 0.97 * target < sum(costs) <= target
    assert thresholds[2] == thresholds[3]
    assert thresholds[0] < thresholds[2] < thresholds[1]


def test_a_layer_without_a_lower_bound_may_vanish_beside_one_that_has_one():
    specs = [spec(16, 16), spec(16, 16)]
    widths = draw(specs)
    budget = WidthBudget(specs, [0, 0], lower=[100.0, 0.0])
    costs = counted(specs, apply_thresholds(specs, widths, budget.thresholds(widths, torch.tensor([90.0]))))
    assert costs[0] >= 100
    assert costs[1] == 0


def test_settle_raises_a_lone_component_as_far_as_it_goes():
    budget = WidthBudget([spec(10, 10, num=1)], [0])
    settled = budget.rounded(torch.tensor([[0.1], [0.1]]), torch.tensor([15.0]))
    assert int(settled.sum()) == 15
    assert budget.rounded(torch.tensor([[0.1], [0.1]]), torch.tensor([50.0])).tolist() == [[10], [10]]


def test_settle_leaves_a_component_at_zero():
    settled = WidthBudget([spec(10, 10, num=2)], [0]).rounded(
        torch.tensor([[0.0, 0.5], [0.3, 0.5]]), torch.tensor([1000.0])
    )
    assert settled.tolist() == [[0, 10], [3, 10]]


def test_settle_goes_on_after_a_round_that_took_one():
    # Of 33 multiply-adds the best takes 2; the next best needs 32, and stands in the way of the third once.
    specs = [spec(16, 16, num=2, align=(1, 1)), spec(64, 64, num=1, align=(16, 16))]
    budget = WidthBudget(specs, [0, 0])
    widths = torch.tensor([[0.031, 0.001, 0.01], [0.031, 0.001, 0.01]])
    assert budget.snap(widths).sum() == 0
    settled = budget.rounded(widths, torch.tensor([33.0]))
    assert settled[:, 2].tolist() == [0, 0]
    assert bool((settled[:, :2] > 0).all())


@pytest.mark.parametrize(
    ("short", "long", "first"),
    [
        (0.52, 0.0149, 0),  # loses 0.02 of its axis, and 0.0049
        (0.501, 0.0149, 1),  # loses 0.001
    ],
)
def test_what_rounding_lost_is_a_share_of_the_axis(short, long, first):
    specs = [spec(10, 10, num=1), spec(100, 100, num=1)]
    budget = WidthBudget(specs, [0, 0])
    widths = torch.tensor([[short, long], [0.5, 0.5]], dtype=torch.float64)
    before = budget.snap(widths)
    after = budget.rounded(widths, multiply_adds(*before).sum().double()[None] + 1)
    expected = before.clone()
    expected[0, first] += 1
    assert torch.equal(after, expected)


def test_settle_passes_over_what_neither_group_nor_layer_can_pay():
    specs = [spec(64, 64, num=1, align=(16, 16)), spec(10, 10, num=1)]
    widths = torch.tensor([[0.36, 0.5], [0.36, 0.5]])
    budget = WidthBudget(specs, [0, 0], upper=[32.0, math.inf])
    settled = budget.rounded(widths, torch.tensor([44.0]))
    assert settled.sum(0).tolist() == [32, 12]


def test_a_lower_bound_of_one_keeps_a_component():
    specs = [spec(16, 16)]
    widths = draw(specs)
    budget = WidthBudget(specs, [0], lower=[1.0])
    assert counted(specs, apply_thresholds(specs, widths, budget.thresholds(widths, torch.tensor([0.0]))))[0] >= 1


def test_settle_raises_one_side_where_the_other_is_full():
    settled = WidthBudget([spec(10, 10, num=1)], [0]).rounded(torch.tensor([[0.1], [1.0]]), torch.tensor([17.0]))
    assert settled.tolist() == [[7], [10]]


def test_a_target_that_is_met_asks_for_nothing():
    widths = draw(SPECS)
    budget = WidthBudget(SPECS, [0, 0, 0, 0])
    assert budget.thresholds(widths, torch.tensor([float(sum(counted(SPECS, widths)))])).tolist() == [0.0] * 4


def test_upper_bounds_alone():
    specs = [spec(16, 16), spec(16, 16)]
    widths = draw(specs)
    budget = WidthBudget(specs, [0, 0], upper=[60.0, 90.0])
    costs = counted(specs, apply_thresholds(specs, widths, budget.thresholds(widths, torch.tensor([1e4]))))
    assert 40 < costs[0] <= 60
    assert 70 < costs[1] <= 90


def test_one_cost_may_be_both_bounds():
    specs = [spec(16, 16)]
    widths = draw(specs)
    budget = WidthBudget(specs, [0], lower=[100.0], upper=[100.0])
    shrunk = apply_thresholds(specs, widths, budget.thresholds(widths, torch.tensor([1e4])))
    assert 90 < counted(specs, shrunk)[0] <= 100
    assert int(multiply_adds(*budget.rounded(shrunk, torch.tensor([1e4]))).sum()) == 100


def test_settle_keeps_a_layer_within_its_bound_where_the_group_has_more():
    specs = [spec(64, 64, num=1, align=(16, 16)), spec(10, 10, num=1)]
    budget = WidthBudget(specs, [0, 0], upper=[32.0, math.inf])
    settled = budget.rounded(torch.tensor([[0.36, 0.5], [0.36, 0.5]]), torch.tensor([200.0]))
    assert settled.sum(0).tolist() == [32, 20]


def test_settle_uses_the_target_of_each_group_up():
    specs = [spec(32, 32), spec(32, 32), spec(32, 32)]
    widths = draw(specs) * 0.5
    targets = torch.tensor([1500.0, 1200.0])
    settled = WidthBudget(specs, [0, 1, 0]).rounded(widths, targets)
    costs = [int(multiply_adds(*part).sum()) for part in settled.split([32, 32, 32], dim=1)]
    assert [costs[0] + costs[2], costs[1]] == targets.tolist()


def test_settle_leaves_a_width_below_zero_at_zero():
    settled = WidthBudget([spec(10, 10, num=1)], [0]).rounded(torch.tensor([[-0.01], [0.5]]), torch.tensor([20.0]))
    assert settled.tolist() == [[0], [5]]


def test_an_axis_does_not_change():
    with pytest.raises(FrozenInstanceError):
        spec(4, 4).dense = 3


@pytest.mark.parametrize("rates", [(1e-3, 4e-3), (1e-2, 1e-5), (0.5, 1.0), (1e-3, 0.0)])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_thresholds_are_in_the_proportion_of_the_rates(rates, share):
    specs = [spec(16, 24), spec(32, 32)]
    widths = draw(specs)
    targets = torch.tensor([share * sum(counted(specs, widths))])
    thresholds = WidthBudget(specs, [0, 0]).thresholds(widths, targets, rates)
    assert thresholds[0].item() * rates[1] == pytest.approx(thresholds[1].item() * rates[0], abs=1e-12)
    shrunk = apply_thresholds(specs, widths, thresholds)
    if rates[1]:
        assert sum(counted(specs, shrunk)) <= targets.item()
        assert sum(counted(specs, shrunk)) >= targets.item() - 40
    else:
        assert torch.equal(shrunk[:, 16:], widths[:, 16:])


def test_growth_is_each_layers_own_rate():
    specs = [spec(32, 32), spec(32, 32), spec(32, 32)]
    widths = draw(specs) * 0.5
    budget = WidthBudget(specs, [0, 0, 1])
    thresholds = budget.thresholds(widths, torch.tensor([1e5, 1e5]), [0.01, 0.002, 0.005])
    assert thresholds.tolist() == pytest.approx([-0.01, -0.002, -0.005])


def test_a_slow_layer_does_not_outgrow_its_rate_for_its_lower_bound():
    specs = [spec(32, 32), spec(32, 32)]
    widths = draw(specs) * 0.3
    budget = WidthBudget(specs, [0, 0], lower=[0.0, 900.0])
    thresholds = budget.thresholds(widths, torch.tensor([1e5]), [0.01, 0.002])
    assert thresholds[1].item() == pytest.approx(-0.002, abs=1e-5)
