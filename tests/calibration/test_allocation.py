"""Splitting one budget over layers: against linear programming, definitions and bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

import gblr_plugin as gblr
from gblr_plugin import ConfigError
from gblr_plugin.calibration.allocation import FLOOR, RULES, allocate, allocate_by_moments
from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.calibration.layer_moments import layer_moments
from gblr_plugin.decomposition.curves import Curve, least_maximum, least_sum
from gblr_plugin.layers.dense import weight_matrix
from gblr_plugin.matrix.metric import Metric


def random_curve(seed: int, size: int = 6) -> Curve:
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(size, generator=g, dtype=torch.float64).cumsum(0) * 10
    error = torch.rand(size, generator=g, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    return Curve(cost - cost[0], error)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_least_sum_is_the_linear_programs_optimum(seed: int, share: float) -> None:
    curves = {str(i): random_curve(10 * seed + i) for i in range(4)}
    low = {n: 0.1 * float(c.cost[-1]) for n, c in curves.items()}
    high = {n: 0.8 * float(c.cost[-1]) for n, c in curves.items()}
    allowed = sum(low.values()) + share * (sum(high.values()) - sum(low.values()))
    spent = least_sum(curves, allowed, low, high)
    assert sum(spent.values()) <= allowed + 1e-9
    assert all(low[n] - 1e-9 <= spent[n] <= high[n] + 1e-9 for n in curves)

    # Hulls as points mixed freely: weights of the points of each curve, which add up to one.
    points = [(n, float(x), float(y)) for n, c in curves.items() for x, y in zip(c.cost, c.error, strict=True)]
    within = [[x if n == name else 0.0 for n, x, _ in points] for name in curves]
    rows = [[x for _, x, _ in points], *within, *[[-v for v in row] for row in within]]
    best = linprog(
        [y for _, _, y in points],
        A_ub=rows,
        b_ub=[allowed, *high.values(), *[-v for v in low.values()]],
        A_eq=[[float(n == name) for n, _, _ in points] for name in curves],
        b_eq=[1.0] * len(curves),
    )
    found = 0.0
    for name, curve in curves.items():  # the hull at what was spent, as the best mix of two points
        mixes = [
            float(y0 + (y1 - y0) * (spent[name] - x0) / (x1 - x0))
            for (x0, y0), (x1, y1) in itertools.combinations(zip(curve.cost, curve.error, strict=True), 2)
            if x0 - 1e-9 <= spent[name] <= x1 + 1e-9
        ]
        found += min(mixes)
    assert found == pytest.approx(best.fun, abs=1e-7)


def test_least_maximum_is_that_of_a_search_over_all_choices() -> None:
    curves = {str(i): random_curve(50 + i, 5) for i in range(3)}
    high = {n: float(c.cost[-1]) for n, c in curves.items()}
    allowed = 0.5 * sum(high.values())
    spent = least_maximum(curves, allowed, dict.fromkeys(curves, 0.0), high)
    assert sum(spent.values()) <= allowed + 1e-9

    def largest(costs: dict[str, float]) -> float:
        return max(float(c.error[(c.cost <= costs[n] + 1e-9).sum() - 1]) for n, c in curves.items())

    grid = itertools.product(*[c.cost.tolist() for c in curves.values()])
    best = min(largest(dict(zip(curves, p, strict=True))) for p in grid if sum(p) <= allowed)
    assert largest(spent) == pytest.approx(best)


def test_envelope_keeps_the_best_choice_at_each_cost() -> None:
    curve = Curve.envelope(torch.tensor([4, 1, 2, 2, 3]), torch.tensor([0.1, 0.9, 0.8, 0.5, 0.6]))
    assert curve.cost.tolist() == [1, 2, 3, 4]
    assert curve.error.tolist() == pytest.approx([0.9, 0.5, 0.5, 0.1])


class Net(nn.Module):
    """A layer of low rank, one of full rank, a packed one and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 12, 3, padding=1)
        self.low, self.full = nn.Linear(48, 48), nn.Linear(48, 48)
        self.packed, self.head = nn.Linear(48, 96, bias=False), nn.Linear(96, 5)
        with torch.no_grad():
            self.low.weight.copy_(torch.randn(48, 3) @ torch.randn(3, 48) / 12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x), inplace=True).flatten(1)
        y: Tensor = self.head(self.packed(F.relu(self.full(self.low(h)), inplace=True)))
        return y


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def layers(net: Net) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_children() if name != "head"}


@pytest.fixture
def calibration() -> Calibration:
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(64, 1, 2, 2, generator=g), torch.randint(5, (64,), generator=g)) for _ in range(3)]
    return Calibration(batches, lambda net, batch: {"loss": F.cross_entropy(net(batch[0]), batch[1])})


def spent(layers: dict[str, nn.Module], shares: dict[str, float]) -> float:
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    return sum(sizes[name] * share for name, share in shares.items()) / sum(sizes.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [0.1, 0.4, 1.0])
def test_every_rule_spends_the_budget_within_bounds(
    net: Net, layers: dict[str, nn.Module], calibration: Calibration, rule: str, budget: float
) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    bounds = {"full": (0.08, 1.0), "packed": (0.0, 1.0)}
    shares = allocate(net, layers, budget, rule, calibration=calibration, bounds=bounds, row_splits={"packed": 2})
    assert set(shares) == set(layers)
    assert budget - 1e-6 <= spent(layers, shares) <= budget + 1e-9
    assert shares["full"] >= 0.08 - 1e-9
    assert all(FLOOR * budget - 1e-9 <= share <= 1 for name, share in shares.items() if name != "full")
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    if rule == "uniform":
        assert all(share == pytest.approx(budget, abs=1e-3) for share in shares.values())
    elif budget == 0.4 and rule in ("weight", "alds"):  # what follows a layer of low rank has inputs of low rank
        assert shares["low"] < shares["full"]


def test_sensitivity_is_the_second_order_rise_of_the_loss() -> None:
    """One linear layer under a quadratic loss: the factored Fisher matrix is exact for Gaussian residuals."""
    torch.manual_seed(0)
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    net = nn.ModuleList([first, second])
    x, noise = torch.randn(20000, 16), torch.randn(20000, 16)

    def forward(nets: nn.ModuleList, batch: tuple[Tensor, Tensor]) -> Tensor:
        # The second output counts ten times: its errors cost a hundred times as much.
        return ((nets[0](batch[0]) + 10 * nets[1](batch[0])) * batch[1]).sum(1).mean()

    with torch.no_grad():
        second.weight.copy_(first.weight)
    chosen = {"0": first, "1": second}
    data = Calibration([(x, noise)], forward)
    assert allocate(net, chosen, 0.4, "output", calibration=data)["1"] == pytest.approx(0.4, abs=0.05)
    weighed = allocate(net, chosen, 0.4, "sensitivity", calibration=data)
    assert weighed["1"] > 0.64
    capped = allocate(net, chosen, 0.4, "sensitivity", calibration=data, bounds={"1": (0.0, 0.5)})
    assert capped["1"] == pytest.approx(0.5)
    assert capped["0"] == pytest.approx(0.3)


def test_moments_that_were_taken_elsewhere_give_the_same_shares(
    net: Net, layers: dict[str, nn.Module], calibration: Calibration
) -> None:
    weights = {name: weight_matrix(module) for name, module in layers.items()}
    inputs, gradients = layer_moments(net, layers, calibration, gradients=True)
    metrics = {name: Metric.from_moment(moment) for name, moment in inputs.items()}
    for rule, slopes in (("sensitivity", gradients), ("output", {})):
        expected = allocate(net, layers, 0.4, rule, calibration=calibration)
        assert allocate_by_moments(weights, 0.4, metrics, slopes) == pytest.approx(expected)


def test_frozen_parameters_are_as_sensitive(net: Net, layers: dict[str, nn.Module], calibration: Calibration) -> None:
    expected = allocate(net, layers, 0.4, "sensitivity", calibration=calibration)
    net.requires_grad_(False)
    assert allocate(net, layers, 0.4, "sensitivity", calibration=calibration) == expected
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_families_take_an_allocation(net: Net, layers: dict[str, nn.Module], calibration: Calibration) -> None:
    shares = allocate(net, {n: layers[n] for n in ("low", "full")}, 0.5, "output", calibration=calibration)
    new = gblr.prepare(
        net, ["low", "full"], family="low_rank", budget=0.5, calibration=calibration, allocation="output"
    )
    for name, layer in new.items():
        assert 0 <= shares[name] - layer.relative_flops < (48 + 48) / 48**2


def test_errors(net: Net, layers: dict[str, nn.Module], calibration: Calibration) -> None:
    with pytest.raises(ConfigError, match="did you mean 'output'"):
        allocate(net, layers, 0.5, "outptu")
    with pytest.raises(ConfigError, match="needs calibration batches"):
        allocate(net, layers, 0.5, "sensitivity")
    with pytest.raises(ConfigError, match="excludes the budget"):
        allocate(net, layers, 0.5, bounds=dict.fromkeys(layers, (0.0, 0.3)))
    with pytest.raises(ConfigError, match=r"budget must be relative FLOPs in \(0, 1\]"):
        allocate(net, layers, 1.5)
    logits = Calibration(calibration.batches, lambda net, batch: net(batch[0]))
    with pytest.raises(ConfigError, match="returns the loss, got a tensor"):
        allocate(net, layers, 0.5, "sensitivity", calibration=logits)
    with pytest.raises(ConfigError, match="'other' is never run"):
        allocate(net, {**layers, "other": nn.Linear(20, 20)}, 0.5, "output", calibration=calibration)
    still = Calibration(calibration.batches, lambda net, batch: 0 * net(batch[0]).sum())
    with pytest.raises(ConfigError, match="all loss gradients are zero"):
        allocate(net, layers, 0.5, "sensitivity", calibration=still)
