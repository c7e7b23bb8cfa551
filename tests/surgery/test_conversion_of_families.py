from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import families
from gblr_plugin.errors import ConfigError
from gblr_plugin.families import FamilyLayer, FamilyLinear
from gblr_plugin.families.layers import trainable
from gblr_plugin.surgery.conversion import prepare_layers
from gblr_plugin.surgery.layer_settings import FamilySettings, LayerSettings
from gblr_plugin.tensor.gblr_tensor import GBLRTensor


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24))


@pytest.mark.parametrize("family", [name for name in families.names() if name != "tucker2"])
def test_every_family_is_swapped_counted_and_reported_alike(family: str) -> None:
    model = network()
    options = {"method": "trapezoid"} if family == "gblr" else {}
    layers = gblr.prepare(model, ["0", "2"], family=family, budget=0.5, **options)
    assert list(layers) == ["0", "2"]
    assert model[0] is layers["0"]
    assert type(model[4]) is nn.Linear
    counted = {layer.name: layer for layer in gblr.report(model, torch.randn(3, 32)).layers}
    assert sum(layer.stored for layer in layers.values()) <= 0.5 * 2 * 32 * 48
    for name, layer in layers.items():
        assert layer.matrix_shape == counted[name].shape
        assert counted[name].structure == family
        assert counted[name].multiply_adds == 3 * layer.stored
    assert counted["4"].structure == "dense"


def test_selection_and_budgets_by_name() -> None:
    model = network()
    chosen = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    budgets = {"0": 0.2, "2": 0.5, "4": 0.9}
    layers: Any = prepare_layers(model, {name: FamilySettings("low_rank", budgets[name]) for name in chosen})
    assert [layer.matrix().left.shape[1] for layer in layers.values()] == [3, 9, 12]


def test_alds_splits_one_budget_over_the_layers() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(48, 2) @ torch.randn(2, 32))
    layers: Any = gblr.prepare(model, ["0", "2"], family="alds", budget=0.5)
    assert layers["0"].relative_flops < 0.2 < layers["2"].relative_flops
    assert layers["0"].stored + layers["2"].stored <= 0.5 * 2 * 48 * 32


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    gblr.prepare(model, None, family="low_rank", budget=0.5)
    assert isinstance(model[0], FamilyLinear)
    assert model[0] is model[2]


def test_hooks_mode_and_flags_are_kept() -> None:
    model = network().eval()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(True))
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    gblr.prepare(model, ["0"], family="monarch", budget=0.5)
    model(torch.randn(2, 32))
    assert seen
    assert not model[0].training
    assert not any(parameter.requires_grad for parameter in model[0].parameters())


def test_nothing_is_touched_when_something_is_wrong() -> None:
    model = network()
    before = list(model)
    with pytest.raises(ConfigError, match="prepare: family 'low_rank' needs a budget"):
        gblr.prepare(model, ["0", "4"], family="low_rank")
    with pytest.raises(ConfigError, match="prepare: budget is for a family; give family="):
        gblr.prepare(model, ["0", "4"], budget=0.5)
    with pytest.raises(ConfigError, match="prepare: settings are of GBLR layers that learn their structure"):
        gblr.prepare(model, ["0"], (), LayerSettings(), family="low_rank", budget=0.5)
    with pytest.raises(ConfigError, match=r"layer '4': low_rank: the budget allows 23 of the 768 multiply-adds"):
        prepare_layers(model, {"0": FamilySettings("low_rank", 0.5), "4": FamilySettings("low_rank", 0.03)})
    with pytest.raises(ConfigError, match=r"no option .colour.; allowed are blocks, calibration, row_splits"):
        gblr.prepare(model, ["0"], family="block_low_rank", budget=0.5, colour=1)
    with pytest.raises(ConfigError, match="budget must be a number in"):
        gblr.prepare(model, ["0"], family="blast", budget=1.5)
    model[4].weight = model[2].weight
    with pytest.raises(ConfigError, match="is tied to that of"):
        gblr.prepare(model, ["2"], family="low_rank", budget=0.5)
    assert all(left is right for left, right in zip(model, before, strict=True))


def test_layers_too_small_to_gain_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1))
    layers = gblr.prepare(model, ["0", "1"], family="low_rank", budget=0.5)
    assert list(layers) == ["0"]
    assert type(model[1]) is nn.Linear
    with pytest.raises(ConfigError, match="layer '1': a 1 x 32 weight is too small to gain from structure"):
        gblr.prepare(model, ["1"], family="low_rank", budget=0.5)


def test_convert_uses_the_frozen_tensor_where_the_embedding_costs_the_same() -> None:
    x = torch.randn(3, 32)
    for family, tensor in (
        ("low_rank", True),
        ("alds", True),
        ("block_low_rank", True),
        ("gblr", True),
        ("monarch", False),
        ("blast", False),
        ("block_sparse", False),
    ):
        model = network()
        gblr.prepare(model, None, family=family, budget=0.5, **({"method": "trapezoid"} if family == "gblr" else {}))
        wanted = model(x).detach()
        gblr.convert(model)
        assert isinstance(model[0].weight, GBLRTensor) is tensor
        assert isinstance(model[0], FamilyLayer) is not tensor
        torch.testing.assert_close(model(x), wanted)
    layer = gblr.convert(trainable(families.get("low_rank"), nn.Linear(32, 24), 0.5))
    assert isinstance(layer.weight, GBLRTensor)


def test_compiles_without_graph_breaks() -> None:
    for family in ("monarch", "blast", "block_sparse"):
        model = nn.Sequential(nn.Linear(30, 25))
        gblr.prepare(model, None, family=family, budget=0.5)
        x = torch.randn(4, 30)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
