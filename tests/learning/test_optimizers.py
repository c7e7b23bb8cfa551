import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.learning.optimizers import (
    STRUCTURE_KEY,
    check_optimized,
    learning_rates,
    param_groups,
    split_structure_group,
    structure_parameters,
)
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix


@pytest.fixture
def model():
    torch.manual_seed(0)
    width = torch.tensor([3, 2, 4])
    rows, cols = Intervals(width, torch.tensor([0, 4, 3]), 6), Intervals(width, torch.tensor([1, 3, 2]), 5)
    matrix = StructuredMatrix.from_factors(torch.randn(3, 6), torch.randn(3, 5), rows, cols)
    return nn.Sequential(GBLRLinear(matrix, torch.zeros(6)), nn.Linear(6, 2))


def backward(model, scale=1.0):
    (model(torch.ones(4, 5)).square().sum() * scale).backward()


def structure_groups(optimizer):
    return [group for group in optimizer.param_groups if group.get(STRUCTURE_KEY)]


# -- the structure's own group ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"lr": 0.1, "weight_decay": 0.5}),
        (Adam, {"lr": 0.1, "weight_decay": 0.5}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.5}),
        (RMSprop, {"lr": 0.1, "momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("way", ["param_groups", "keywords", "split"])
def test_own_group_has_own_options(model, kind, options, way):
    if way == "param_groups":
        optimizer = kind(param_groups(model, **options))
    elif way == "keywords":
        optimizer = kind(param_groups(model), **options)
    else:
        optimizer = kind(model.parameters(), **options)
        assert split_structure_group(optimizer, structure_parameters(model))
    rest, own = optimizer.param_groups
    assert {id(p) for p in own["params"]} == {id(model[0].widths), id(model[0].locations)}
    assert len(rest["params"]) == len(list(model.parameters())) - 2
    assert own["lr"] == 0.1
    assert own["weight_decay"] == 0.0
    assert own.get("momentum", 0.0) == 0.0
    assert not own.get("nesterov", False)
    if "betas" in optimizer.defaults:
        assert own["betas"] == (0.0, 0.999)
        assert rest["betas"] == (0.9, 0.999)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_own_learning_rate(model):
    optimizer = AdamW(param_groups(model, lr=0.1, structure_lr=0.02))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert learning_rates(optimizer, [model[0].widths, model[0].U, nn.Parameter(torch.ones(1))]) == [0.02, 0.1, None]


def test_split_keeps_state_and_names(model):
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    state = optimizer.state[model[0].widths]
    assert split_structure_group(optimizer, structure_parameters(model), lr=0.05)
    assert optimizer.state[model[0].widths] is state
    rest, own = optimizer.param_groups
    assert own["param_names"] == ["0.widths", "0.locations"]
    assert rest["param_names"] == [n for n, _ in model.named_parameters() if n not in own["param_names"]]
    assert own["lr"] == 0.05
    optimizer.step()


def test_split_twice_or_of_a_stranger_changes_nothing(model):
    optimizer = AdamW(param_groups(model, lr=0.1))
    assert split_structure_group(optimizer, structure_parameters(model))
    assert len(optimizer.param_groups) == 2
    stranger = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not split_structure_group(stranger, structure_parameters(model))
    assert len(stranger.param_groups) == 1


def test_split_from_several_groups(model):
    layer = model[0]
    rest = [layer.U, layer.V, layer.bias, *model[1].parameters()]
    optimizer = AdamW([{"params": [layer.widths, *rest], "lr": 0.1}, {"params": [layer.locations], "lr": 0.3}])
    split_structure_group(optimizer, structure_parameters(model))
    assert learning_rates(optimizer, [layer.widths, layer.locations]) == [0.1, 0.3]
    assert len(structure_groups(optimizer)) == 2
    backward(model)
    optimizer.step()


def test_split_needs_a_scale_for_an_own_rate(model):
    optimizer = SGD(model.parameters(), lr=0.0)
    with pytest.raises(ConfigError, match="non-zero rate"):
        split_structure_group(optimizer, structure_parameters(model), lr=0.1)


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step)]),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1], total_steps=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.01], [0.1], step_size_up=4, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=10)], milestones=[4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=[1e-4]),
}


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("lr", [None, 0.02])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_new_group_follows_the_schedule(model, name, lr, steps_before):
    optimizer = AdamW(model.parameters(), lr=0.1)
    reference = AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler, unsplit = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)

    def advance():
        for opt, sched in ((optimizer, scheduler), (reference, unsplit)):
            opt.step()
            sched.step(*([1.0] if name == "plateau" else []))

    for _ in range(steps_before):
        advance()
    base = {"cyclic": 0.01, "plateau": reference.param_groups[0]["lr"]}.get(name, 0.1)  # a plateau records no base rate
    split_structure_group(optimizer, structure_parameters(model), lr=lr, schedulers=[scheduler, None])
    ratio = 1.0 if lr is None else lr / base
    for _ in range(8):
        rest, own = (group["lr"] for group in optimizer.param_groups)
        assert rest == pytest.approx(reference.param_groups[0]["lr"])
        assert own == pytest.approx(ratio * rest)
        advance()
    assert len(scheduler.get_last_lr()) == 2


def test_unoptimized_widths_are_named(model):
    with pytest.raises(ConfigError, match="layer 'fc': its widths are in no optimizer"):
        check_optimized({"fc": model[0]}, [SGD(model[1].parameters(), lr=0.1)])
    check_optimized({"fc": model[0]}, [SGD(model.parameters(), lr=0.1)])
