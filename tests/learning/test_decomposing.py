import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

import gblr_plugin as gblr
from gblr_plugin.errors import ConfigError
from gblr_plugin.learning.goals import LayerGoal
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.learning.optimizers import param_groups
from gblr_plugin.learning.pace import PACE
from gblr_plugin.learning.schedule import Schedule
from gblr_plugin.surgery.conversion import prepare, prepare_layers
from gblr_plugin.surgery.layer_settings import LayerSettings

STEPS, COOLDOWN = 40, 20


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16, bias=False))


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(24, 16, generator=generator)
    for _ in range(STEPS):
        x = torch.randn(32, 24, generator=generator)
        yield x, (x @ teacher).tanh()


def learner_of(model, schedule=None, budget=0.3, **settings):
    layers = prepare(model, settings=LayerSettings("dense", **settings))
    goals = dict.fromkeys(layers, LayerGoal(budget, group="all"))
    return StructureLearner(layers, goals, schedule or Schedule(2, COOLDOWN))


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
@pytest.mark.parametrize("align", [1, 4])
def test_until_the_cool_down_layers_train_as_dense_weights(optimizer, align):
    dense, model = network(), network()
    learner = learner_of(model, align=align)
    mine, plain = optimizer(model.parameters(), lr=1e-2), optimizer(dense.parameters(), lr=1e-2)
    learner.attach_all([mine])
    some = list(batches())[: COOLDOWN - 1]
    train(model, mine, some)
    train(dense, plain, some)
    assert all(layer.holds_dense_weight for layer in learner.layers.values())
    for name, layer in learner.layers.items():
        torch.testing.assert_close(layer.to_dense(), dense.get_submodule(name).weight, rtol=1e-4, atol=1e-5)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias, dense.get_submodule(name).bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_splits", [1, 2])
def test_budget_is_met_at_the_cool_down_and_conversion_is_exact(row_splits):
    model = network()
    learner = learner_of(model, row_splits=row_splits)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    learner.attach_all([optimizer])
    data = list(batches())
    train(model, optimizer, data[: COOLDOWN - 1])
    assert not learner.frozen
    train(model, optimizer, data[COOLDOWN - 1 : COOLDOWN])
    assert learner.frozen
    assert 0.28 <= learner.relative_flops <= 0.3
    before = F.mse_loss(model(data[0][0]), data[0][1])
    train(model, optimizer, data[COOLDOWN:])
    assert F.mse_loss(model(data[0][0]), data[0][1]) < before
    assert learner.relative_flops <= 0.3
    expected = model(data[0][0])
    torch.testing.assert_close(gblr.convert(model)(data[0][0]), expected, rtol=1e-4, atol=1e-5)


def test_decomposition_is_in_the_metric_of_the_inputs_and_corrects_the_bias():
    # Inputs vary in four directions alone, around an offset: a budget that allows rank 4 loses next to nothing.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    directions, offset = torch.randn(4, 32), 3 * torch.randn(32)
    data = [(torch.randn(64, 4) @ directions + offset, torch.randn(64, 32)) for _ in range(6)]
    learner = learner_of(model, Schedule(0, 6), budget=0.25)
    optimizer = SGD(model.parameters(), lr=0.0)
    learner.attach_all([optimizer])
    before = model(data[0][0]).detach()
    weight = model[0].to_dense().detach()
    train(model, optimizer, data)
    assert learner.frozen
    error = (model(data[0][0]) - before).norm() / (before - before.mean(0)).norm()
    assert error < 0.02
    assert (model[0].to_dense() - weight).norm() > 0.3 * weight.norm()  # which other directions lose


def test_samples_without_gradient_are_left_out():
    model = nn.Sequential(nn.Linear(16, 16))
    learner = learner_of(model, Schedule(0, 2), budget=0.5)
    optimizer = SGD(model.parameters(), lr=0.0)
    learner.attach_all([optimizer])
    x = torch.randn(8, 5, 16)
    x[:, 3:] = torch.nan_to_num(torch.full((), 1e6))  # padding, which the loss ignores
    optimizer.step()  # from the first step on the layers are watched
    y = model(x)
    y[:, :3].square().sum().backward()
    moments = learner._decomposer._watches["0"].moments
    assert moments.count == 24
    torch.testing.assert_close(moments.mean[0], x[:, :3].reshape(-1, 16).double().mean(0))


def test_stopped_and_resumed_it_is_bit_for_bit_the_uninterrupted_run():
    data = list(batches())

    def made():
        model = network()
        learner = learner_of(model)
        optimizer = AdamW(param_groups(model, lr=1e-2))
        return model, learner, optimizer

    whole, learner, optimizer = made()
    learner.attach_all([optimizer])
    train(whole, optimizer, data)
    for stop in (5, COOLDOWN - 3, COOLDOWN, COOLDOWN + 5):
        model, learner, optimizer = made()
        learner.attach_all([optimizer])
        train(model, optimizer, data[:stop])
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), learner.state_dict()))
        model, learner, optimizer = made()
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        learner.load_state_dict(state[2])
        learner.attach_all([optimizer])
        train(model, optimizer, data[stop:])
        for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), (stop, name)


def test_host_that_gives_the_progress():
    model = network()
    layers = prepare(model, settings=LayerSettings("dense"))
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.3)), None)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    learner.attach_all([optimizer])
    for index, batch in enumerate(batches()):
        train(model, optimizer, [batch])
        learner.set_progress(index / 10)
        if index == 10:
            learner.freeze()
    assert learner.frozen
    assert all(layer.relative_flops <= 0.3 for layer in layers.values())


def test_factors_move_further_once_they_are_factors():
    model = network()
    learner = learner_of(model)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    learner.attach_all([optimizer])
    data = list(batches())
    train(model, optimizer, data[: COOLDOWN + 12])
    assert learner._pace.pace == PACE
    factor, bias = model[0].U.detach().clone(), model[0].bias.detach().clone()
    twin = copy.deepcopy(model)
    other = AdamW(twin.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[:1])
    train(twin, other, data[:1])
    live = model[0].masked_factors()[0] != 0
    torch.testing.assert_close((model[0].U - factor)[live], PACE * (twin[0].U - factor)[live], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model[0].bias - bias, twin[0].bias - bias)


def test_what_cannot_be_is_refused_in_one_line():
    model = network()
    layers = prepare(model, settings=LayerSettings("dense"))
    with pytest.raises(ConfigError, match="layer '0': initialiser 'dense' needs a budget"):
        StructureLearner(layers, dict.fromkeys(layers, LayerGoal(threshold=0.1)), Schedule(0, 5))
    model = network()
    layers = {**prepare(model, ["0"], settings=LayerSettings("dense")), **prepare(model, ["2"])}
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.3)), Schedule(0, 5))
    with pytest.raises(ConfigError, match="layer '0': initialiser 'dense' must be that of all layers"):
        learner.begin()
    with pytest.raises(ConfigError, match="'dense' begins at the whole weight"):
        prepare(network(), settings=LayerSettings("dense", budget=0.5))


def test_a_share_that_reaches_the_dense_weight_is_frozen_with_the_others():
    model = network()
    starts = {"0": LayerSettings("gblr", budget=1.0), "2": LayerSettings("gblr", budget=0.2)}
    layers = prepare_layers(model, starts)
    assert layers["0"].holds_dense_weight
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.7, group="all")), Schedule(0, 5))
    learner.begin()
    assert learner.frozen
    assert learner.relative_flops <= 0.7


def test_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False))
    layers = prepare(model, settings=LayerSettings("dense"))
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.4, group=1)), Schedule(0, 8))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    learner.attach_all([optimizer])
    for _ in range(12):
        x = torch.randn(8, 6, 12, 12)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert learner.frozen
    assert 0.35 <= learner.relative_flops <= 0.4
    expected = model(x)
    torch.testing.assert_close(gblr.convert(model)(x), expected, rtol=1e-4, atol=1e-5)
