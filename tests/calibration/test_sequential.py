"""Layer-by-layer compression of small models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.calibration.inputs import input_rows
from gblr_plugin.calibration.layer_moments import layer_moments
from gblr_plugin.calibration.sequential import FittedPiece, fit_layers, fit_pieces
from gblr_plugin.decomposition import decompose
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers.dense import replace_modules
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.utils.progress import shown_by


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 40, bias=False),
        nn.GELU(),
        nn.Linear(40, 30),
    )


def put(model: nn.Module, results: dict[str, tuple[StructuredMatrix, Tensor | None]]) -> nn.Module:
    """A copy with the dense approximations in place."""
    model = copy.deepcopy(model)
    for name, (matrix, bias) in results.items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(matrix.to_dense().reshape(layer.weight.shape))
        if bias is not None:
            layer.bias = nn.Parameter(bias)
    return model


def decomposed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    budget: float | Mapping[str, float],
    *,
    mask: Callable[[object], Tensor | None] | None = None,
    sequential: bool = True,
    row_splits: Mapping[str, int] | None = None,
    **options: str,
) -> dict[str, tuple[StructuredMatrix, Tensor | None]]:
    """The layers fitted by decompositions, in the dtype of their weights."""

    def fit(name: str, target: Tensor, metric: Metric) -> StructuredMatrix:
        share, splits = budget if isinstance(budget, float) else budget[name], (row_splits or {}).get(name, 1)
        found = decompose(target, share, calibration=metric, row_splits=splits, **options)
        return found.to(layers[name].weight.dtype)

    calibration = Calibration(batches, lambda net, batch: net(batch), mask, sequential=sequential)
    return fit_layers(model, layers, calibration, fit)


def output_error(model: nn.Module, changed: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want = model(x)
        return float((changed(x) - want).norm() / (want - want.mean(0)).norm())


def test_each_correction_helps_and_the_model_is_left_alone(network: nn.Sequential) -> None:
    x = torch.randn(400, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    layers = {name: network.get_submodule(name) for name in ("3", "5")}
    before = copy.deepcopy(network.state_dict())
    network.train()
    errors = []
    for sequential in (False, True):
        results = decomposed(network, layers, x.split(100), 0.25, sequential=sequential, method="trapezoid")
        assert all(matrix.relative_flops <= 0.25 for matrix, _ in results.values())
        errors.append(output_error(network, put(network, results), x))
    assert errors[1] < errors[0] < 1
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


def test_budgets_by_name_order_and_biases(network: nn.Sequential) -> None:
    x = torch.randn(60, 2, 4, 4)
    layers = {name: network.get_submodule(name) for name in ("5", "0", "3")}
    shown: list[str] = []
    with shown_by(shown.append):
        results = decomposed(network, layers, [x], {"0": 0.6, "3": 0.3, "5": 0.5}, method="svd")
    assert list(results) == ["0", "3", "5"]
    shapes = {name: (m.shape, None if b is None else tuple(b.shape)) for name, (m, b) in results.items()}
    assert shapes == {"0": ((16, 18), (16,)), "3": ((40, 256), None), "5": ((30, 40), (30,))}
    assert [text.partition(",")[0] for text in shown] == [f"decomposing {i + 1}/3: {n}" for i, n in enumerate("035")]
    assert results["3"][0].relative_flops <= 0.3 < results["5"][0].relative_flops


def test_without_a_bias_the_moments_are_not_centred() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 10, bias=False)
    x = torch.randn(500, 12) + 3.0
    found, bias = decomposed(layer, {"": layer}, [x], 0.4, method="svd")[""]
    assert bias is None
    root = torch.linalg.cholesky(x.T.double() @ x.double() / 500)
    whitened = layer.weight.double() @ root
    best = torch.linalg.svdvals(whitened)[2:].square().sum().sqrt()  # what rank 2 cannot hold
    torch.testing.assert_close(((layer.weight - found.to_dense()).double() @ root).norm(), best, rtol=1e-2, atol=0)


class Attention(nn.Module):
    """Two projections of one input, masked positions that are garbage, and a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)
        self.packed = nn.Linear(24, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(torch.tanh(self.q(x)) * self.k(x))


def test_shared_inputs_masks_and_splits() -> None:
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(20, 6, 24)
    mask = torch.ones(20, 6)
    mask[:, 4:] = 0
    garbage = x.clone()
    garbage[:, 4:] = 100 * torch.randn(20, 2, 24)
    layers = dict(model.named_children())
    settings = {"method": "trapezoid", "row_splits": {"packed": 2}}
    clean = decomposed(model, layers, [x[:, :4]], 0.5, **settings)
    masked = decomposed(model, layers, [garbage], 0.5, mask=lambda _: mask, **settings)
    assert clean["packed"][0].row_splits == 2
    for name in layers:
        torch.testing.assert_close(clean[name][0].to_dense(), masked[name][0].to_dense(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(clean[name][1], masked[name][1], atol=1e-4, rtol=1e-3)


def test_errors_name_the_layer(network: nn.Sequential) -> None:
    x = torch.randn(10, 2, 4, 4)
    with pytest.raises(ConfigError, match="no batches"):
        decomposed(network, {"5": network[5]}, [], 0.5)
    with pytest.raises(ConfigError, match="'9' is never run"):
        decomposed(network, {"9": nn.Linear(20, 20)}, [x], 0.5)
    with pytest.raises(ConfigError, match="layer '5': decompose: budget"):
        decomposed(network, {"5": network[5]}, [x], 5.0)
    with pytest.raises(ConfigError, match="layer '1'"):
        decomposed(network, {"1": network[1]}, [x], 0.5)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


def test_inputs_that_never_change_leave_the_weight_to_be_fitted(network: nn.Sequential) -> None:
    with torch.no_grad():
        network[3].weight.zero_()
    layers = {"5": network[5]}
    found, bias = decomposed(network, layers, [torch.randn(20, 2, 4, 4)], 0.5)["5"]
    torch.testing.assert_close(found.to_dense(), decompose(network[5].weight.detach(), 0.5).to_dense())
    constant = nn.functional.gelu(torch.zeros(40))
    torch.testing.assert_close(found.to_dense() @ constant + bias, network[5](constant))


class Branches(nn.Module):
    """Convolutions that see one input by other patches, as the two ways through a residual block do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.way = nn.Conv2d(16, 24, 3, padding=1)
        self.twin = nn.Conv2d(16, 24, 3, padding=1)
        self.short = nn.Conv2d(16, 24, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return (self.way(h) * self.twin(h) + self.short(h)).square().mean()


@pytest.mark.parametrize("loss", [False, True])
def test_convolutions_share_moments_only_where_they_see_the_same_patches(loss: bool) -> None:
    torch.manual_seed(0)
    model = Branches()
    layers = {name: module for name, module in model.named_children() if name != "stem"}
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    calibration = Calibration(batches, lambda net, batch: net(batch), loss=loss)
    found = fit_layers(
        model, layers, calibration, lambda _n, w, metric: decompose(w, 0.5, method="trapezoid", calibration=metric)
    )
    assert {name: tuple(matrix.to_dense().shape) for name, (matrix, _) in found.items()} == {
        "way": (24, 144),
        "twin": (24, 144),
        "short": (24, 16),
    }
    inputs, slopes = layer_moments(model, layers, calibration, gradients=loss)
    assert inputs["way"] is inputs["twin"]
    assert inputs["short"].shape == (16, 16)
    assert set(slopes) == (set(layers) if loss else set())
    rows = torch.cat([input_rows(model.short, model.stem(x).relu()).flatten(0, 1) for x in batches]).double()
    torch.testing.assert_close(inputs["short"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """A block with a mask, of two layers that share an input and one after them."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width, bias=bias), nn.Linear(width, width)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out(torch.tanh(self.q(y)) * self.k(y).cumsum(1)) * keep[..., None]


class Stack(nn.Module):
    """Blocks between a first and a last layer."""

    def __init__(self, depth: int, width: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(Residual(width, bias=place % 2 == 0) for place in range(depth))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = block(h, attention_mask)
        return self.last(h)


def stack(depth: int) -> tuple[Stack, dict[str, nn.Module], Calibration]:
    torch.manual_seed(0)
    model = Stack(depth).double()
    batches = []
    for length in (7, 5, 9):
        keep = torch.ones(8, length, dtype=torch.float64)
        keep[2:5, 3:] = 0
        batches.append({"x": torch.randn(8, length, 6, dtype=torch.float64), "attention_mask": keep})
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return model, layers, Calibration(batches, lambda net, batch: net(**batch))


def reference(model: nn.Module, names: Sequence[Sequence[str]], calibration: Calibration, rank: int) -> nn.Module:
    """Low rank by the formulas of moments.py over all rows, with a pass over the model for every layer."""
    done = copy.deepcopy(model)

    def rows(net: nn.Module, name: str) -> Tensor:
        seen: list[Tensor] = []
        handle = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for batch in calibration.batches:
            net(**batch)
            seen[-1] = seen[-1][batch["attention_mask"] != 0]
        handle.remove()
        return torch.cat(seen)

    with torch.no_grad():
        for group in names:
            x0, x1 = rows(model, group[0]), rows(done, group[0])
            for name in group:
                layer, changed = model.get_submodule(name), done.get_submodule(name)
                a0, a1 = (x0 - x0.mean(0), x1 - x1.mean(0)) if layer.bias is not None else (x0, x1)
                square, cross = a1.T @ a1 / len(a1), a0.T @ a1 / len(a1)
                damped = calibration.damping * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
                target = layer.weight @ (cross + damped) @ torch.linalg.inv(square + damped)
                root = torch.linalg.cholesky(square + damped)
                u, s, v = torch.linalg.svd(target @ root)
                found = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
                changed.weight.copy_(found)
                if layer.bias is not None:
                    changed.bias.copy_(layer.bias + layer.weight @ x0.mean(0) - found @ x1.mean(0))
    return done


def low_rank(name: str, target: Tensor, metric: Metric) -> StructuredMatrix:
    return decompose(target, 2 * sum(target.shape) / target.numel(), method="svd", calibration=metric)


def test_block_by_block_gives_what_passes_over_the_model_give() -> None:
    model, layers, calibration = stack(3)
    before = copy.deepcopy(model.state_dict())
    found = fit_layers(model, layers, calibration, low_rank)
    blocks = [f"blocks.{place}." for place in range(3)]
    order = [["first"], *([f"{b}q", f"{b}k"] if i == 0 else [f"{b}out"] for b in blocks for i in (0, 1)), ["last"]]
    assert list(found) == [name for group in order for name in group]
    want = reference(model, order, calibration, 2)
    for name, (matrix, bias) in found.items():
        layer = want.get_submodule(name)
        torch.testing.assert_close(matrix.to_dense(), layer.weight.detach(), rtol=1e-8, atol=1e-9)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-8, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_block_runs_as_often_wherever_it_is_and_however_many_there_are() -> None:
    runs = {}
    for depth in (3, 6):
        model, layers, calibration = stack(depth)
        counts = [0] * depth

        def count(_module: nn.Module, _args: object, place: int, counts: list[int] = counts) -> None:
            counts[place] += 1

        for place, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(count, place=place))
        fit_layers(model, layers, calibration, low_rank)
        runs[depth] = counts
    assert len(set(runs[3][1:] + runs[6][1:])) == 1  # the first is given what both networks have in common


class Skipping(Stack):
    """A network whose last layer looks at a state between its blocks."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        states = [torch.tanh(self.first(x))]
        for block in self.blocks:
            states.append(block(states[-1], attention_mask))
        return self.last(states[-1] + states[1])


def test_a_model_without_a_chain_is_fitted_by_passes_over_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, _, calibration = stack(2)
    skipping = Skipping(2).double()
    skipping.load_state_dict(model.state_dict())
    layers = {name: module for name, module in skipping.named_modules() if isinstance(module, nn.Linear)}
    found = fit_layers(skipping, layers, calibration, low_rank)
    assert "runs the whole model for every layer" in caplog.text
    order = [["first"], *([f"blocks.{b}.{n}" for n in g] for b in (0, 1) for g in (["q", "k"], ["out"])), ["last"]]
    want = reference(skipping, order, calibration, 2)
    torch.testing.assert_close(found["last"][0].to_dense(), want.last.weight.detach(), rtol=1e-8, atol=1e-9)


def test_a_restored_block_is_passed_as_it_is_and_a_block_may_be_replaced_while_it_is_looked_at() -> None:
    model, layers, calibration = stack(3)
    want = fit_layers(model, layers, calibration, low_rank)

    def keep(pieces: Iterator[FittedPiece[StructuredMatrix]], net: nn.Module) -> dict[str, Tensor]:
        found = {}
        for piece in pieces:
            for name, (matrix, bias) in piece.fitted.items():
                found[name] = matrix.to_dense()
                if piece.name:
                    set_layer(net, name, matrix, bias)
        return found

    once = copy.deepcopy(model)
    keep(fit_pieces(once, dict_of(once), calibration, low_rank), once)

    def restore(name: str) -> bool:
        if name != "blocks.1":
            return False
        again.blocks[1].load_state_dict(once.blocks[1].state_dict())
        return True

    again = copy.deepcopy(model)
    found = keep(fit_pieces(again, dict_of(again), calibration, low_rank, restore=restore), again)
    assert not any(name.startswith("blocks.1.") for name in found)
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, want[name][0].to_dense(), rtol=1e-8, atol=1e-9)


def dict_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def set_layer(model: nn.Module, name: str, matrix: StructuredMatrix, bias: Tensor | None) -> None:
    layer = nn.Linear(*matrix.shape[::-1], bias=bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(matrix.to_dense())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    replace_modules(model, {id(model.get_submodule(name)): layer})
