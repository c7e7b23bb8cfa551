"""Exactly once per step that an optimizer really takes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from gblr_plugin.layers import GBLRLinear
from gblr_plugin.learning.optimizers import STRUCTURE_KEY, param_groups
from gblr_plugin.learning.step_hook import StepHook
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


def test_momentum_cycling_leaves_the_structure_alone(model):
    optimizer = AdamW(param_groups(model, lr=0.1))
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    hook = StepHook(optimizer, lambda: None)
    for _ in range(3):
        backward(model)
        optimizer.step()
        assert [group["betas"] for group in optimizer.param_groups if group.get(STRUCTURE_KEY)] == [(0.0, 0.999)]
        scheduler.step()
    hook.remove()


class OverridesStep(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Fused(AdamW):
    """Skips inside its kernel: the scaler always calls step and hands it found_inf."""

    def __init__(self, params):
        super().__init__(params, fused=True)


@pytest.mark.parametrize("kind", [AdamW, SGD, OverridesStep])
def test_counts_real_steps(model, kind):
    optimizer, count = kind(param_groups(model, lr=1e-3)), []
    hook = StepHook(optimizer, lambda: count.append(1))
    for micro_batch in range(6):  # accumulation: a step every second micro-batch
        backward(model)
        if micro_batch % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert len(count) == 3
    hook.remove()
    optimizer.step()
    assert len(count) == 3


@pytest.mark.parametrize("kind", [SGD, OverridesStep, Fused])
def test_counts_no_step_that_a_scaler_skips(model, kind):
    optimizer, count = kind(param_groups(model, lr=1e-3)), []
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is (kind is Fused)
    StepHook(optimizer, lambda: count.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    taken = 0
    for step in range(9):
        optimizer.zero_grad()
        overflow = step % 3 == 0
        scaler.scale(model(torch.ones(2, 5)).sum()).backward()
        if overflow:
            model[0].U.grad[0, 0] = float("inf")
        before = model[0].V.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before, model[0].V)
        assert moved is not overflow
        taken += moved
    assert taken == 6
    assert len(count) == taken


def test_closures_and_their_exceptions(model):
    optimizer, count = SGD(param_groups(model, lr=1e-3)), []
    StepHook(optimizer, lambda: count.append(1))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert len(count) == 1

    def failing():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(failing)
    assert len(count) == 1


def test_several_optimizers_count_apart(model):
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[1].parameters(), lr=0.1)
    count = {"first": 0, "second": 0}
    StepHook(first, lambda: count.update(first=count["first"] + 1))
    StepHook(second, lambda: count.update(second=count["second"] + 1))
    for step in range(4):
        backward(model)
        first.step()
        if step % 2:
            second.step()
    assert count == {"first": 4, "second": 2}


def test_schedulers_may_come_before_or_after(model):
    for order in ("hook first", "scheduler first"):
        optimizer, count = SGD(param_groups(model, lr=0.1)), []
        if order == "hook first":
            hook = StepHook(optimizer, lambda: count.append(1))  # noqa: B023
            scheduler = lr_scheduler.StepLR(optimizer, 1)
        else:
            scheduler = lr_scheduler.StepLR(optimizer, 1)
            hook = StepHook(optimizer, lambda: count.append(1))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: pytest.fail(str(args[0])))
            for _ in range(3):
                optimizer.step()
                scheduler.step()
        assert len(count) == 3, order
        hook.remove()
        optimizer.step()
        assert len(count) == 3, order


def test_removal_leaves_no_trace(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    plain = dict(optimizer.__dict__)
    StepHook(optimizer, lambda: None).remove()
    assert optimizer.__dict__ == plain
    lr_scheduler.StepLR(optimizer, 1)
    wrapped = optimizer.__dict__["step"]
    StepHook(optimizer, lambda: None).remove()
    assert optimizer.__dict__["step"] is wrapped


def test_copies_of_the_optimizer_are_not_hooked(model):
    optimizer, count = SGD(param_groups(model, lr=0.1)), []
    StepHook(optimizer, lambda: count.append(1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
    assert count == []
