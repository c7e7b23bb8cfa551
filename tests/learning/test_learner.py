import copy
import io
import logging
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from gblr_plugin.errors import ConfigError, GBLRError
from gblr_plugin.layers.dense import structured_like, weight_matrix
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.learning.goals import LayerGoal
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.learning.optimizers import param_groups
from gblr_plugin.learning.schedule import Schedule
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.surgery.conversion import convert, prepare_layers
from gblr_plugin.surgery.counting import report
from gblr_plugin.surgery.layer_settings import LayerSettings


def full_rank(module):
    u, s, v = torch.linalg.svd(weight_matrix(module), full_matrices=False)
    return StructuredMatrix.from_factors((u * s.sqrt()).T, s.sqrt()[:, None] * v)


def build(align=1, seed=0, sizes=(32, 64, 48)):
    torch.manual_seed(seed)
    modules = []
    for n, m in pairwise(sizes):
        dense = nn.Linear(n, m)
        modules += [structured_like(dense, full_rank(dense), align=align), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def layers_of(model):
    return {str(i): module for i, module in enumerate(model) if not isinstance(module, nn.Tanh)}


def train(model, optimizer, steps, first=0, accumulate=1):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 + step)
        optimizer.zero_grad()
        for _ in range(accumulate):
            x = torch.randn(16, model[0].in_features, generator=generator)
            target = torch.sin(3 * x).repeat(1, 2)[:, : model[-1].out_features]
            F.mse_loss(model(x), target).backward()
        optimizer.step()


def counted(layer):
    """Multiply-adds by counting the ones of exact boxcars made from the layer's parameters."""
    rows, cols = (
        gaudi_mask(layer.widths[i].detach(), layer.locations[i].detach(), n, None, form="fft", align=layer.align[i])
        .round()
        .count_nonzero(1)
        for i, n in enumerate(layer.axis_lengths)
    )
    return int(torch.where((rows > 0) & (cols > 0), rows + cols, 0).sum())


def relative(layers):
    layers = list(layers)
    return sum(counted(layer) for layer in layers) / sum(math.prod(layer.matrix_shape) for layer in layers)


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize(("kind", "lr"), [(AdamW, 1e-3), (AdamW, 3e-2), (SGD, 1e-4), (SGD, 1e-1)])
def test_realised_cost_meets_the_budget(budget, align, kind, lr):
    model = build(align)
    layers = layers_of(model)
    optimizer = kind(param_groups(model, lr=lr))
    learner = StructureLearner(
        layers, {name: LayerGoal(budget=budget, group="all") for name in layers}, Schedule(2, 20)
    )
    learner.attach_all([optimizer])
    train(model, optimizer, 21)
    assert learner.frozen
    assert budget - 0.01 <= relative(layers.values()) <= budget
    assert learner.relative_flops == relative(layers.values())


def test_layers_without_group_meet_their_own_budgets():
    model = build()
    layers = layers_of(model)
    goals = {"0": LayerGoal(budget=0.2), "2": LayerGoal(budget=0.7)}
    optimizer = AdamW(param_groups(model, lr=1e-2))
    StructureLearner(layers, goals, Schedule(2, 20)).attach_all([optimizer])
    train(model, optimizer, 21)
    for name, goal in goals.items():
        assert goal.budget - 0.01 <= relative([layers[name]]) <= goal.budget


def test_pooled_group_respects_the_bounds_of_its_layers():
    model = build(sizes=(32, 48, 64, 48))
    layers = layers_of(model)
    goals = {
        "0": LayerGoal(budget=0.3, group="g", max_flops=0.2),
        "2": LayerGoal(budget=0.3, group="g", min_flops=0.35),
        "4": LayerGoal(budget=0.3, group="g"),
    }
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, goals, Schedule(2, 30))
    learner.attach_all([optimizer])
    costs = []
    for step in range(31):
        train(model, optimizer, 1, first=step)
        costs.append(relative([layers["0"]]))
    assert relative([layers["0"]]) <= 0.2
    assert relative([layers["2"]]) >= 0.35
    assert 0.29 <= relative(layers.values()) <= 0.3
    # The bound is approached along the ramp, not enforced at once.
    assert costs[3] > 0.5


@pytest.mark.parametrize(("low", "high"), [(0.4, math.inf), (0.0, 0.2)])
def test_bounds_that_exclude_the_budget_are_refused(low, high):
    layers = layers_of(build())
    goals = {name: LayerGoal(budget=0.3, group="g", min_flops=low, max_flops=high) for name in layers}
    with pytest.raises(ConfigError, match=r"excludes the budget 0\.3"):
        StructureLearner(layers, goals, Schedule(0, 5))


def test_a_budget_that_cannot_be_reached_is_reported(caplog):
    torch.manual_seed(0)
    layer = structured_like(nn.Linear(32, 32), StructuredMatrix.from_factors(torch.randn(3, 32), torch.randn(3, 32)))
    learner = StructureLearner({"fc": layer}, {"fc": LayerGoal(budget=0.5)}, None)
    with caplog.at_level(logging.WARNING):
        learner.freeze()
    assert relative([layer]) == 3 * 64 / 1024
    assert "'fc'" in caplog.text
    assert "reached 0.1875" in caplog.text


def test_cost_never_exceeds_the_ramped_target():
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.25, group=0) for n in layers}, Schedule(5, 30))
    learner.attach_all([optimizer])
    start = relative(layers.values())
    for step in range(30):
        train(model, optimizer, 1, first=step)
        allowed = start + (0.25 - start) * Schedule.ramp(learner.progress)
        if step < 5:
            assert learner.lambdas() == dict.fromkeys(layers, 0.0)
        assert relative(layers.values()) <= allowed + 1e-12 or step < 5


# -- homotopy and freeze ---------------------------------------------------------------------------------------------


def test_homotopy_ends_in_frozen_exact_boxcars():
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.3) for n in layers}, Schedule(5, 25, 1.0, 100.0))
    assert next(iter(layers.values())).sigma is None
    learner.attach_all([optimizer])
    sigmas = [learner.sigma]
    for step in range(30):
        train(model, optimizer, 1, first=step)
        sigmas.append(learner.sigma)
    assert sigmas[:6] == [1.0] * 6
    assert sigmas[6:25] == pytest.approx([1 + 99 * i / 20 for i in range(1, 20)])
    assert sigmas[25:] == [None] * 6
    for layer in layers.values():
        assert layer.structure_frozen
        x = torch.randn(4, layer.in_features)
        torch.testing.assert_close(layer(x), F.linear(x, layer.structure().to_dense(), layer.bias))
    frozen = [layer.widths.clone() for layer in layers.values()], [layer.U.clone() for layer in layers.values()]
    train(model, optimizer, 3, first=30)
    assert all(torch.equal(a, layer.widths) for a, layer in zip(frozen[0], layers.values(), strict=True))
    assert not any(torch.equal(a, layer.U) for a, layer in zip(frozen[1], layers.values(), strict=True))
    assert learner.lambdas() == dict.fromkeys(layers, 0.0)


def test_fixed_lambda_is_algorithm_1():
    model, reference = build(), build()
    threshold, lr = 0.4, 1e-2
    optimizer, plain = AdamW(param_groups(model, lr=lr)), AdamW(param_groups(reference, lr=lr))
    learner = StructureLearner(
        layers_of(model), {n: LayerGoal(threshold=threshold) for n in layers_of(model)}, Schedule(0, 1000)
    )
    learner.attach_all([optimizer])
    for step in range(8):
        train(model, optimizer, 1, first=step)
        sigma = learner.schedule.sigma(learner.schedule.progress(step))
        for layer in layers_of(reference).values():
            layer.set_sigma(sigma)
        train(reference, plain, 1, first=step)
        with torch.no_grad():
            for layer in layers_of(reference).values():
                layer.widths.copy_(F.softshrink(layer.widths, threshold * lr).clamp(0, 1))
                layer.locations.sub_(layer.locations.floor())
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert learner.lambdas() == pytest.approx(dict.fromkeys(layers_of(model), threshold))


def test_freeze_does_not_shrink_a_fixed_lambda_again():
    model = build()
    layers = layers_of(model)
    learner = StructureLearner(layers, {n: LayerGoal(threshold=0.4) for n in layers}, Schedule(0, 3))
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner.attach_all([optimizer])
    shrunk = {}
    original = learner.freeze
    learner.freeze = lambda: (shrunk.update({n: x.intervals() for n, x in layers.items()}), original())
    train(model, optimizer, 3)
    assert learner.frozen
    for name, layer in layers.items():
        for before, after in zip(shrunk[name], layer.intervals(), strict=True):
            assert torch.equal(before.width, after.width)


# -- once per real step ----------------------------------------------------------------------------------------------


def thresholds_seen(monkeypatch):
    seen = []
    from gblr_plugin.learning import shrinking as module

    original = module.prox_and_clip_
    monkeypatch.setattr(
        module, "prox_and_clip_", lambda w, x, t: (seen.append([round(v, 9) for v in t.tolist()]), original(w, x, t))
    )
    return seen


def test_accumulation_shrinks_once_per_step(monkeypatch):
    seen = thresholds_seen(monkeypatch)
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, {n: LayerGoal(threshold=1.0) for n in layers}, Schedule(0, 100))
    learner.attach_all([optimizer])
    train(model, optimizer, 4, accumulate=3)
    assert seen == [[0.01, 0.01]] * 4
    assert learner.step_count == 4


def test_several_optimizers_shrink_their_own_layers(monkeypatch):
    seen = thresholds_seen(monkeypatch)
    model = build()
    layers = layers_of(model)
    first, second = AdamW(param_groups(model[0], lr=1e-2)), SGD(param_groups(model[2], lr=1e-3))
    learner = StructureLearner(layers, {n: LayerGoal(threshold=1.0) for n in layers}, Schedule(0, 100))
    learner.attach_all([first, second, SGD([nn.Parameter(torch.ones(1))], lr=1.0)])
    for _ in range(3):
        model(torch.randn(4, 32)).square().mean().backward()
        first.step()
        second.step()
    assert seen == [[0.01], [0.001]] * 3
    assert learner.step_count == 3


def pooled(layers, schedule, budget=0.3):
    return StructureLearner(layers, {name: LayerGoal(budget=budget, group="all") for name in layers}, schedule)


def fill_gradients(model, step):
    for parameter in model.parameters():
        parameter.grad = None
    x = torch.randn(16, model[0].in_features, generator=torch.Generator().manual_seed(1000 + step))
    F.mse_loss(model(x), torch.sin(3 * x).repeat(1, 2)[:, : model[-1].out_features]).backward()


def values(layer):
    return [parameter.detach().clone() for parameter in layer.parameters()]


def test_a_step_moves_the_layers_of_its_optimizer_alone():
    model = build()
    optimizers = [AdamW(param_groups(model[0], lr=1e-2)), SGD(param_groups(model[2], lr=1e-2))]
    pooled(layers_of(model), Schedule(0, 30)).attach_all(optimizers)
    for step in range(29):
        fill_gradients(model, step)
        for optimizer, own, other in zip(optimizers, (model[0], model[2]), (model[2], model[0]), strict=True):
            before, held = own.widths.detach().clone(), values(other)
            optimizer.step()
            assert all(map(torch.equal, held, values(other)))
            assert not torch.equal(before, own.widths)


@pytest.mark.parametrize("apart", [False, True])
def test_a_group_has_one_lambda_and_each_layer_its_own_rate(apart):
    model = build()
    layers, rates = layers_of(model), (1e-3, 4e-3)
    groups = [group for layer, lr in zip(layers.values(), rates, strict=True) for group in param_groups(layer, lr=lr)]
    optimizers = [SGD(groups[:2], lr=1.0), SGD(groups[2:], lr=1.0)] if apart else [SGD(groups, lr=1.0)]
    learner = pooled(layers, Schedule(0, 10))
    learner.attach_all(optimizers)
    before = [layer.widths.detach().clone() for layer in layers.values()]
    for optimizer in optimizers:
        optimizer.step()  # without gradients: the proximal step alone
    one, two = learner.lambdas().values()
    assert one == pytest.approx(two)
    for layer, old, lr in zip(layers.values(), before, rates, strict=True):
        shrunk = (old - layer.widths.detach())[old > 0.5]
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, one * lr), rtol=1e-4, atol=1e-6)
    ramped = learner._costs.of_groups(
        Schedule.ramp(learner.progress), torch.device("cpu")
    ).item()  # met once both have taken their step
    assert ramped - 200 < sum(map(counted, layers.values())) <= ramped


@pytest.mark.parametrize("budget", [0.1, 0.4])
@pytest.mark.parametrize(("first", "second"), [(1e-2, 1e-2), (1e-2, 1e-3), (1e-3, 1e-2), (1e-2, 0.0)])
@pytest.mark.parametrize("every", [(1, 1), (1, 3), (3, 1)])
def test_several_optimizers_meet_the_budget_of_their_group(every, first, second, budget):
    model = build()
    optimizers = [AdamW(param_groups(model[0], lr=first)), AdamW(param_groups(model[2], lr=second))]
    learner = pooled(layers_of(model), Schedule(2, 30), budget)
    learner.attach_all(optimizers)
    for step in range(100):
        fill_gradients(model, step)
        for optimizer, period in zip(optimizers, every, strict=True):
            if step % period == 0:
                optimizer.step()
    assert learner.frozen
    assert budget - 0.01 <= relative(layers_of(model).values()) <= budget


def test_it_does_not_matter_which_optimizer_is_first():
    torch.manual_seed(0)
    dense = nn.Linear(48, 48)
    layers = {name: structured_like(dense, full_rank(dense)) for name in "ab"}
    first, second = (AdamW(param_groups(layer, lr=1e-2)) for layer in layers.values())
    learner = pooled(layers, Schedule(0, 60))
    learner.attach_all([first, second])
    costs = []
    for step in range(59):
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
        for optimizer in (first, second):
            optimizer.zero_grad()
        sum(F.mse_loss(layer(x), x.roll(1, 1)) for layer in layers.values()).backward()
        first.step()
        second.step()
        costs.append([counted(layer) for layer in layers.values()])
        # At most one step's gradients of the second come on top of the target.
        assert (
            sum(costs[-1])
            <= learner._costs.of_groups(Schedule.ramp(learner.progress), torch.device("cpu")).item()
            + 0.02 * 2 * 48 * 48
        )
    assert all(abs(a - b) <= 0.1 * max(a, b) for a, b in costs)


@pytest.mark.parametrize("stop", [7, 8])
def test_resume_between_the_steps_of_two_optimizers(stop):
    """They take turns: at an odd step the round is half over."""

    def make():
        model = build()
        optimizers = [AdamW(param_groups(model[0], lr=1e-2)), AdamW(param_groups(model[2], lr=1e-3))]
        learner = pooled(layers_of(model), Schedule(0, 12))
        learner.attach_all(optimizers)
        return model, optimizers, learner

    def go(model, optimizers, steps):
        for step in steps:
            fill_gradients(model, step)
            optimizers[step % 2].step()

    whole, optimizers, learner = make()
    go(whole, optimizers, range(28))
    assert learner.frozen
    model, optimizers, learner = make()
    go(model, optimizers, range(stop))
    state = copy.deepcopy([part.state_dict() for part in (model, *optimizers, learner)])
    again, optimizers, learner = make()
    for part, saved in zip((again, *optimizers, learner), state, strict=True):
        part.load_state_dict(saved)
    go(again, optimizers, range(stop, 28))
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def test_frozen_layers_go_with_the_first_optimizer():
    model = build()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    optimizers = [AdamW(param_groups(model[0], lr=1e-2)), SGD([nn.Parameter(torch.ones(1))], lr=1.0)]
    learner = pooled(layers_of(model), Schedule(0, 20))
    learner.attach_all(optimizers)
    costs = []
    for step in range(20):
        fill_gradients(model, step)
        optimizers[0].step()
        costs.append(counted(model[2]))
    assert costs[5] > costs[10] > costs[-1]
    assert 0.29 <= relative(layers_of(model).values()) <= 0.3


def test_skipped_steps_do_not_shrink(monkeypatch):
    seen = thresholds_seen(monkeypatch)
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2), fused=True)
    learner = StructureLearner(layers, {n: LayerGoal(threshold=1.0) for n in layers}, Schedule(0, 100))
    learner.attach_all([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 32)).square().mean()).backward()
        if step % 2:
            model[0].U.grad[0, 0] = math.nan
        scaler.step(optimizer)
        scaler.update()
    assert len(seen) == learner.step_count == 3


def test_attaching_again_follows_the_new_optimizer(monkeypatch):
    seen = thresholds_seen(monkeypatch)
    model = build()
    layers = layers_of(model)
    learner = StructureLearner(layers, {n: LayerGoal(threshold=1.0) for n in layers}, Schedule(0, 100))
    old, new = (AdamW(param_groups(model, lr=1e-2)) for _ in range(2))
    learner.attach_all([old])
    learner.attach_all([new])
    train(model, old, 2)
    assert seen == []
    train(model, new, 2)
    assert len(seen) == learner.step_count == 2
    learner.detach()
    train(model, new, 2)
    assert len(seen) == 2


def test_unsplit_optimizer_still_shrinks_at_its_rate(monkeypatch):
    seen = thresholds_seen(monkeypatch)
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    StructureLearner(layers, {n: LayerGoal(threshold=1.0) for n in layers}, Schedule(0, 100)).attach_all([optimizer])
    train(model, optimizer, 1)
    assert seen == [[0.01, 0.01]]


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 12, 20, 24])
@pytest.mark.parametrize("learner_first", [False, True])
def test_resume_equals_an_uninterrupted_run(stop, learner_first):
    def start():
        model = build()
        optimizer = AdamW(param_groups(model, lr=1e-2))
        layers = layers_of(model)
        goals = {"0": LayerGoal(budget=0.3), "2": LayerGoal(threshold=0.5)}
        learner = StructureLearner(layers, goals, Schedule(4, 20))
        learner.attach_all([optimizer])
        return model, optimizer, learner

    model, optimizer, learner = start()
    train(model, optimizer, stop)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, learner)], buffer)
    train(model, optimizer, 30 - stop, first=stop)

    again, again_optimizer, again_learner = start()
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    parts = [(again, states[0]), (again_optimizer, states[1]), (again_learner, states[2])]
    for part, state in reversed(parts) if learner_first else parts:
        part.load_state_dict(state)
    assert again_learner.frozen is (stop >= 20)
    train(again, again_optimizer, 30 - stop, first=stop)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again_learner.state_dict() == learner.state_dict()
    assert [layer.sigma for layer in layers_of(again).values()] == [None, None]


# -- driven from outside ---------------------------------------------------------------------------------------------


def test_host_turns_the_clock():
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.4, group=0) for n in layers}, None)
    learner.attach_all([optimizer])
    start = relative(layers.values())
    for share in (0.25, 0.5, 1.0):
        learner.set_progress(share)
        assert learner.sigma == 1 + 99 * share
        train(model, optimizer, 2)
        assert relative(layers.values()) <= start + (0.4 - start) * share + 1e-12
        assert not learner.frozen
    learner.freeze()
    assert 0.39 <= relative(layers.values()) <= 0.4
    learner.set_progress(0.1)
    assert learner.sigma is None


# -- bad input and bad numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["widths", "locations"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_structure_stops_with_the_layers_name(what, value):
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    StructureLearner(layers, {n: LayerGoal(budget=0.4) for n in layers}, Schedule(0, 9)).attach_all([optimizer])
    train(model, optimizer, 2)
    with torch.no_grad():
        getattr(layers["2"], what)[0, 3] = value
    with pytest.raises(GBLRError, match=f"layer '2': {what} became NaN or infinite at step 3"):
        optimizer.step()


def test_non_finite_factors_stop_the_freeze():
    layers = layers_of(build())
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.4) for n in layers}, None)
    with torch.no_grad():
        layers["0"].V[0, 0] = math.nan
    with pytest.raises(GBLRError, match="layer '0': V became NaN"):
        learner.freeze()


def test_names_and_groups_must_agree():
    layers = layers_of(build())
    with pytest.raises(ConfigError, match="differ in"):
        StructureLearner(layers, {"0": LayerGoal(budget=0.5)}, None)
    with pytest.raises(ConfigError, match="two goals"):
        StructureLearner(
            layers, {"0": LayerGoal(budget=0.5, group=1), "2": LayerGoal(budget=0.4, group=1)}, Schedule(0, 2)
        )


def test_widths_outside_every_optimizer_are_refused():
    model = build()
    layers = layers_of(model)
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.5) for n in layers}, Schedule(0, 2))
    with pytest.raises(ConfigError, match="layer '2': its widths are in no optimizer"):
        learner.attach_all([SGD(model[0].parameters(), lr=0.1)])


def test_stepping_before_begin_is_an_error():
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner = StructureLearner(layers, {n: LayerGoal(budget=0.5) for n in layers}, Schedule(0, 2))
    learner.attach(optimizer)
    model(torch.randn(2, 32)).sum().backward()
    with pytest.raises(GBLRError, match=r"call begin\(\)"):
        optimizer.step()


def test_learning_survives_deepcopy_of_the_model():
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    StructureLearner(layers, {n: LayerGoal(budget=0.5) for n in layers}, Schedule(1, 5)).attach_all([optimizer])
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 32)
    expected = twin(x)
    train(model, optimizer, 4, first=3)
    assert torch.equal(twin(x), expected)
    assert twin[0].sigma is not None


# -- compaction ------------------------------------------------------------------------------------------------------


def compacting(compact, kind=AdamW):
    model = build()
    optimizer = kind(param_groups(model, lr=1e-2))
    layers = layers_of(model)
    learner = StructureLearner(
        layers, {n: LayerGoal(budget=0.1, group=0) for n in layers}, Schedule(4, 20), compact=compact
    )
    learner.attach_all([optimizer])
    return model, optimizer, learner


def test_compaction_at_the_freeze_changes_no_result():
    (full, full_opt, full_learner), (small, small_opt, small_learner) = compacting(False), compacting(True)
    for model, optimizer in ((full, full_opt), (small, small_opt)):
        train(model, optimizer, 30)
    assert small_learner.relative_flops == full_learner.relative_flops
    for layer, reference in zip(layers_of(small).values(), layers_of(full).values(), strict=True):
        assert layer.U.shape[0] == reference.num_components < reference.U.shape[0]
        torch.testing.assert_close(layer.to_dense(), reference.to_dense(), rtol=1e-4, atol=1e-5)
        for key in ("exp_avg", "exp_avg_sq"):
            assert small_opt.state[layer.U][key].shape == layer.U.shape


@pytest.mark.parametrize("stop", [10, 24])
def test_resume_of_a_compacted_run(stop):
    model, optimizer, learner = compacting(True)
    train(model, optimizer, stop)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, learner)])
    train(model, optimizer, 30 - stop, first=stop)
    again = compacting(True)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    train(again[0], again[1], 30 - stop, first=stop)
    for (name, a), b in zip(model.named_parameters(), again[0].named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name


@pytest.mark.parametrize("learner_first", [False, True])
def test_a_frozen_training_goes_back_to_an_earlier_state(learner_first: bool) -> None:
    model = build(sizes=(24, 32))
    optimizer = SGD(model.parameters(), lr=0.01)
    learner = StructureLearner(layers_of(model), {"0": LayerGoal(budget=0.5)}, Schedule(1, 6))
    learner.attach_all([optimizer])
    train(model, optimizer, 3)
    states = copy.deepcopy((model.state_dict(), learner.state_dict()))
    sigma = learner.sigma
    train(model, optimizer, 5, first=3)
    end = copy.deepcopy(model.state_dict())
    assert learner.frozen
    pairs = list(zip((model, learner), states, strict=True))
    for part, state in pairs[::-1] if learner_first else pairs:
        part.load_state_dict(state)
    assert (learner.frozen, learner.sigma) == (False, sigma)
    train(model, optimizer, 5, first=3)
    assert learner.frozen
    for name, value in model.state_dict().items():
        assert torch.equal(value, end[name]), name


def test_a_start_within_its_budget_is_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
    x = torch.randn(5, 24)
    layers = prepare_layers(model, {"0": LayerSettings("trapezoid", budget=0.5), "2": LayerSettings("svd")})
    start, before = model(x), layers["0"].widths.detach().clone()
    learner = StructureLearner(layers, {name: LayerGoal(budget=0.5) for name in layers}, Schedule(2, 20))
    optimizer = AdamW(param_groups(model, lr=1e-2))
    learner.attach_all([optimizer])
    assert (layers["0"].structure_frozen, layers["0"].sigma) == (True, None)
    assert (layers["2"].structure_frozen, layers["2"].sigma) == (False, 1.0)
    assert learner.sigma == 1.0
    layers["2"].set_sigma(None)
    torch.testing.assert_close(model(x), start, rtol=0, atol=0)
    for _ in range(25):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert learner.frozen
    assert torch.equal(layers["0"].widths, before)
    assert layers["2"].relative_flops <= 0.5


@pytest.mark.parametrize("bounds", [{}, {"max_flops": 0.6}])
def test_a_group_within_its_budget_descends_where_a_layer_exceeds_its_bound(bounds: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
    layers = prepare_layers(
        model, {"0": LayerSettings("trapezoid", budget=0.8), "2": LayerSettings("trapezoid", budget=0.2)}
    )
    goals = {name: LayerGoal(budget=0.5, group="all", **bounds) for name in layers}
    learner = StructureLearner(layers, goals, Schedule(2, 20))
    learner.begin()
    assert learner.frozen == (not bounds)
    learner.freeze()
    assert layers["0"].relative_flops <= bounds.get("max_flops", 0.8)


@pytest.mark.parametrize("start", ["gblr", "svd"])
@pytest.mark.parametrize("group", [None, "all"])
@pytest.mark.parametrize("sizes", [(17, 31), (16, 16, 24)])
def test_the_whole_budget_shrinks_nothing(start: str, group: str | None, sizes: tuple[int, ...]) -> None:
    """Layers whose components cost more than the dense matrix are stored as that: there is nothing to win."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))
    x = torch.randn(5, sizes[0])
    before = model(x).detach()
    settings = LayerSettings(start, budget=None if start == "svd" else 1.0)
    layers = prepare_layers(model, {str(i): settings for i in range(len(model))})
    assert all(layer.relative_flops > 1 or layer.holds_dense_weight for layer in layers.values())
    optimizer = SGD(param_groups(model, lr=0.0))
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(1.0, group=group)), Schedule(1, 4))
    learner.attach_all([optimizer])
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert learner.frozen
    assert report(convert(model.eval()), x).relative_flops == 1.0
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


def test_the_whole_budget_still_keeps_to_the_bounds_of_layers() -> None:
    model = build()
    layers = layers_of(model)
    goals = {"0": LayerGoal(1.0, group="g", max_flops=0.5), "2": LayerGoal(1.0, group="g")}
    optimizer = AdamW(param_groups(model, lr=1e-3))
    StructureLearner(layers, goals, Schedule(1, 6)).attach_all([optimizer])
    train(model, optimizer, 7)
    assert layers["0"].relative_flops <= 0.5


def test_a_second_learner_of_the_same_layers_is_refused() -> None:
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    first, again = (
        StructureLearner(layers, dict.fromkeys(layers, LayerGoal(budget)), Schedule(1, 4)) for budget in (0.5, 0.2)
    )
    first.attach_all([optimizer])
    sigma = layers["0"].sigma
    for attach in (lambda: again.attach_all([optimizer]), lambda: again.attach(optimizer)):
        with pytest.raises(ConfigError, match=r"layer '0': another structure learner drives it .* detach\(\) that one"):
            attach()
    assert layers["0"].sigma == sigma
    first.detach()
    again.attach_all([optimizer])
    train(model, optimizer, 5)
    assert again.relative_flops <= 0.2


def test_a_second_round_says_what_to_do() -> None:
    model = build()
    layers = layers_of(model)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    goals = dict.fromkeys(layers, LayerGoal(0.5))
    first = StructureLearner(layers, goals, Schedule(1, 4))
    first.freeze()
    again = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.2)), Schedule(1, 4))
    with pytest.raises(GBLRError, match=r"for a second round call unfreeze_structure\(\) first"):
        again.attach_all([optimizer])
    for layer in layers.values():
        layer.unfreeze_structure()
    again = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.2)), Schedule(1, 4))
    again.attach_all([optimizer])
    train(model, optimizer, 5)
    assert again.relative_flops <= 0.2


def test_a_state_of_something_else_is_refused() -> None:
    layers = layers_of(build())
    learner = StructureLearner(layers, dict.fromkeys(layers, LayerGoal(0.5)), Schedule(1, 4))
    learner.begin()
    state = learner.state_dict()
    for bad in ({"x": 1}, [1], None):
        with pytest.raises(ConfigError, match=r"its state lacks step_count, .*; give what state_dict\(\) gave"):
            learner.load_state_dict(bad)
    with pytest.raises(ConfigError, match="the state is of 1 layers, these are 2"):
        learner.load_state_dict({**state, "start_costs": [3.0]})
    assert learner.state_dict() == state
