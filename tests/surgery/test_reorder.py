import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gblr_plugin as gblr
from gblr_plugin import ConfigError
from gblr_plugin.surgery.reorder import reorder, similar_order


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 20), nn.Linear(6, 20, bias=False), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(F.silu(self.gate(x)) * self.up(x)), "place": torch.arange(3)}


def network(between: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), between or nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))


def test_clusters_become_neighbours() -> None:
    torch.manual_seed(0)
    kind = torch.arange(60) % 3
    units = torch.randn(3, 40)[kind] + 0.3 * torch.randn(60, 40)
    order = similar_order([units, 0 * units])
    assert sorted(order.tolist()) == list(range(60))
    assert int((kind[order].diff() != 0).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_network_computes_what_it_did(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), torch.randn(7, 8, dtype=dtype)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    orders = gblr.reorder(model, [("0", "2"), ("2", "4")])  # the one between by rows and columns
    assert list(orders) == ["2", "4"]
    torch.testing.assert_close(model(x), before, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    first, second = orders["2"], orders["4"]
    assert not torch.equal(first, torch.arange(24))
    after = model.state_dict()
    assert torch.equal(after["0.weight"], state["0.weight"][first])
    assert torch.equal(after["0.bias"], state["0.bias"][first])
    assert torch.equal(after["2.weight"], state["2.weight"][:, first][second])
    assert torch.equal(after["4.weight"], state["4.weight"][:, second])
    assert torch.equal(after["4.bias"], state["4.bias"])


def test_gates_and_patterns() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"a": Gated(), "b": Gated()}), torch.randn(4, 6)
    before = [model[name](x)["y"] for name in "ab"]
    assert list(reorder(model, [(["*.gate", "*.up"], "*.down")])) == ["a.down", "b.down"]
    for name, y in zip("ab", before, strict=True):
        torch.testing.assert_close(model[name](x)["y"], y)
    one = model["a"].train()
    reorder(one, [(["gate", "up"], "down")], example_input={"x": x})
    assert one.training


def test_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model, x = nn.Sequential(pytorch_utils.Conv1D(24, 8), nn.GELU(), pytorch_utils.Conv1D(8, 24)), torch.randn(3, 8)
    before = model(x)
    assert not torch.equal(reorder(model, [("0", "2")])["2"], torch.arange(24))
    torch.testing.assert_close(model(x), before)


def test_blocks_on_intervals_fit_better() -> None:
    torch.manual_seed(0)
    units, inputs, outputs = (torch.arange(size) % 4 for size in (96, 48, 48))
    first = nn.Linear(48, 96)
    second = nn.Linear(96, 48)
    with torch.no_grad():
        first.weight.copy_(torch.randn(96, 48) * (0.1 + (units[:, None] == inputs.sort().values)))
        second.weight.copy_(torch.randn(48, 96) * (0.1 + (outputs.sort().values[:, None] == units)))
    model = nn.Sequential(first, nn.ReLU(), second)

    def error(layer: nn.Linear) -> float:
        weight = layer.weight.detach()
        return float((gblr.decompose(weight, 0.3).to_dense() - weight).norm() / weight.norm())

    before = [error(first), error(second)]
    reorder(model, [("0", "2")], example_input=torch.randn(3, 48))
    assert all(error(layer) < 0.7 * old for layer, old in zip((first, second), before, strict=True))


@pytest.mark.parametrize("between", [nn.LayerNorm(24), nn.Softmax(-1), nn.Unflatten(1, (4, 6))])
def test_more_than_functions_of_single_units_between_is_noticed(between: nn.Module) -> None:
    if isinstance(between, nn.LayerNorm):
        nn.init.normal_(between.weight)
    if isinstance(between, nn.Unflatten):
        between = nn.Sequential(between, nn.Softmax(-1), nn.Flatten())
    model, x = network(between), torch.randn(7, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if isinstance(between, nn.Softmax):  # the same for every order
        reorder(model, [("0", "2")], example_input=x)
        return
    with pytest.raises(ConfigError, match=r"output changes by .* so that between '0' and '2' lies more than"):
        reorder(model, [("2", "4"), ("0", "2")], example_input=(x,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("0", "4"), ("0", "2")], "the rows of '0' are reordered by two pairs"),
        ([("0", "4"), ("2", "4")], "the columns of '4' are reordered by two pairs"),
        ([("[02]", "4")], r"'\[02\]' matches 2 layers and '4' 1; need as many"),
        ([("4", "2")], "'4' makes 5 units and '2' takes 24; need as many"),
        ([("2", "2")], "'2' makes 24 units and '2' takes 24"),
        ([("0",)], "a pair is"),
        ([("x", "2")], "'x' matches no module"),
    ],
)
def test_pairs_that_cannot_be(pairs: list[tuple[str, ...]], message: str) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        reorder(model, pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_linear_layers_that_are_not_tied() -> None:
    with pytest.raises(ConfigError, match="'0' is a Conv2d; need linear layers"):
        reorder(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)), [("0", "2")])
    model = network()
    model[4] = nn.Linear(24, 24)
    model[4].weight = model[2].weight
    with pytest.raises(ConfigError, match="tied"):
        reorder(model, [("0", "2")])
