"""What each private name of NNI stands for, seen through what NNI does in public."""

from __future__ import annotations

import nni
import torch
from nni.compression.pruning import AGPPruner, LevelPruner
from nni.compression.utils import TorchEvaluator
from torch import nn

from gblr_plugin.nni import GBLRPruner, _compat


def traced(model):
    return nni.trace(torch.optim.SGD)([{"params": [model.fc1.weight]}, {"params": [model.fc2.weight]}], lr=0.25)


def test_helpers_build_the_optimizers_that_the_training_function_gets(kit):
    model, given = kit.MLP(), []

    def loop(model, optimizers, step, schedulers, max_steps, max_epochs):
        given.append((optimizers, schedulers))

    optimizer = traced(model)
    scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 3)
    evaluator = TorchEvaluator(loop, optimizer, kit.training_step, lr_schedulers=scheduler)
    assert _compat.training_step(evaluator) is kit.training_step
    _compat.record(evaluator, model)
    _compat.record(evaluator, model)  # once is enough
    (helper,), ((made, index),) = _compat.optimizer_helpers(evaluator), _compat.scheduler_helpers(evaluator)
    assert index == 0
    assert [group["params"] for group in _compat.recorded_groups(helper)] == [["fc1.weight"], ["fc2.weight"]]

    _compat.recorded_groups(helper)[1]["params"][:] = ["fc3.weight"]
    _compat.replace_helpers(evaluator, [helper], [made])
    evaluator.bind_model(model)
    evaluator.train(1, None)
    evaluator.unbind_model()
    ((built, decay),) = given
    assert [group["params"][0] for group in built.param_groups] == [model.fc1.weight, model.fc3.weight]
    assert isinstance(decay, torch.optim.lr_scheduler.StepLR)
    assert _compat.several_if_given_so(evaluator, ["a"], ["b"]) == ("a", "b")
    assert _compat.several_if_given_so(evaluator, ["a"], []) == ("a", None)


def test_an_evaluator_that_was_given_lists_passes_lists_on(kit):
    model = kit.MLP()
    evaluator = TorchEvaluator(kit.train, [traced(model)], kit.training_step)
    _compat.record(evaluator, model)
    assert _compat.several_if_given_so(evaluator, ["a"], []) == (["a"], None)
    assert len(_compat.optimizer_helpers(evaluator)) == 1
    assert _compat.scheduler_helpers(evaluator) == []


def test_a_wrapped_model_has_wrappers_and_other_names(kit):
    model = kit.MLP()
    pruner = LevelPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    assert _compat.is_wrapped(pruner)
    wrapper = _compat.wrapper_of(model.fc1)
    assert wrapper.module is model.fc1
    assert _compat.wrapper_of(model.fc2) is None
    names = _compat.parameter_names(pruner)
    there = dict(model.named_parameters())
    assert all(there[wrapped] is not None for wrapped in names.values())
    assert {"fc1.weight", "fc2.weight"} <= names.keys()
    pruner.unwrap_model()
    assert not _compat.is_wrapped(pruner)
    assert _compat.wrapper_of(model.fc1) is None


def test_the_present_goal_rises_to_the_final_one_under_a_driver(kit):
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    inner = GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], evaluator)
    seen = []
    follow = inner._follow_goals
    inner._follow_goals = lambda: (seen.append(_compat.present_goal(inner, "fc1", "weight", "sparse_ratio")), follow())
    AGPPruner(inner, 1, 4).compress(8, None)
    assert seen == sorted(seen)
    assert seen[0] < 0.5
    assert seen[-1] == 0.5
    assert isinstance(model, nn.Module)
