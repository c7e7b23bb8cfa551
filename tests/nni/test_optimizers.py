from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import nni
import pytest
import torch
from nni.compression.pruning import AGPPruner
from nni.compression.utils import TorchEvaluator
from nni.compression.utils.constructor_helper import LRSchedulerConstructHelper, OptimizerConstructHelper
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gblr_plugin import ConfigError
from gblr_plugin.learning.optimizers import STRUCTURE_KEY
from gblr_plugin.nni import GBLRPruner
from gblr_plugin.nni.optimizers import adopt, check_recorded, is_adopted
from gblr_plugin.surgery.conversion import prepare


def built(pruner: GBLRPruner) -> torch.optim.Optimizer:
    evaluator = pruner.evaluator
    evaluator.bind_model(pruner.bound_model, pruner._get_param_names_map())
    return evaluator._optimizers[0]


def names_in(group: dict[str, Any], model: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(names[id(parameter)] for parameter in group["params"])


def own_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = [group for group in optimizer.param_groups if group.get(STRUCTURE_KEY)]
    return group


def test_factors_stand_where_the_weight_stood_and_the_structure_apart(kit: Any) -> None:
    model = kit.MLP()
    groups = [
        {"params": [model.fc1.weight, model.fc1.bias], "lr": 0.3},
        {"params": [*model.fc2.parameters(), *model.fc3.parameters()]},
    ]
    made = nni.trace(torch.optim.AdamW)(groups, lr=0.1, weight_decay=0.5)
    pruner = GBLRPruner(
        model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], TorchEvaluator(kit.train, made, kit.training_step), 1, 5
    )
    optimizer = built(pruner)
    first, second, structure = optimizer.param_groups
    assert names_in(first, model) == ["fc1.U", "fc1.V", "fc1.bias"]
    assert names_in(second, model) == ["fc2.bias", "fc2.weight", "fc3.bias", "fc3.weight"]
    assert names_in(structure, model) == ["fc1.locations", "fc1.widths"]
    assert (first["lr"], structure["lr"]) == (0.3, 0.3)
    assert (structure["betas"], structure["weight_decay"]) == ((0.0, 0.999), 0.0)
    assert (first["betas"], first["weight_decay"]) == ((0.9, 0.999), 0.5)


def test_every_part_of_a_structured_layer_trains(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 10)
    before = {name: value.clone() for name, value in model.named_parameters()}
    pruner.compress(12, None)
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still


def test_structure_lr_and_momentum(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.5, "gblr": {"structure_lr": 0.02}}]
    pruner = GBLRPruner(model, config, kit.evaluator(model, torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), 1, 5)
    group = own_group(built(pruner))
    assert group["lr"] == pytest.approx(0.02)
    assert (group["momentum"], group["nesterov"]) == (0.0, False)
    pruner.evaluator.unbind_model()
    pruner.compress(6, None)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: nni.trace(lr_scheduler.LambdaLR)(o, [lambda step: 0.5, lambda step: 0.25]),
        lambda o: nni.trace(lr_scheduler.LambdaLR)(o, lr_lambda=[lambda step: 0.5, lambda step: 0.25]),
        lambda o: nni.trace(lr_scheduler.OneCycleLR)(o, [0.1, 0.2], total_steps=50),
        lambda o: nni.trace(lr_scheduler.OneCycleLR)(o, total_steps=50, max_lr=[0.1, 0.2]),
        lambda o: nni.trace(lr_scheduler.CyclicLR)(o, [0.01, 0.02], [0.1, 0.2], cycle_momentum=False),
        lambda o: nni.trace(lr_scheduler.ReduceLROnPlateau)(o, min_lr=[0.001, 0.002]),
        lambda o: nni.trace(lr_scheduler.MultiStepLR)(o, milestones=[2, 4]),  # a list, but not one entry a group
        lambda o: nni.trace(lr_scheduler.CosineAnnealingLR)(o, 50),
    ],
)
def test_schedulers_with_one_entry_a_group(kit: Any, scheduler: Any) -> None:
    model = kit.MLP()
    groups = [{"params": model.fc1.parameters()}, {"params": [*model.fc2.parameters(), *model.fc3.parameters()]}]
    made = nni.trace(torch.optim.AdamW)([{"params": list(group["params"])} for group in groups], lr=0.01)
    evaluator = TorchEvaluator(kit.train, made, kit.training_step, lr_schedulers=scheduler(made))
    pruner = GBLRPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}], evaluator, 1, 5)
    optimizer = built(pruner)
    for _ in range(3):
        _, source, structure = optimizer.param_groups
        assert structure["lr"] == source["lr"]
        optimizer.step()
        made_anew = pruner.evaluator._lr_schedulers[0]
        made_anew.step(1.0) if isinstance(made_anew, lr_scheduler.ReduceLROnPlateau) else made_anew.step()


def test_one_cycle_keeps_the_structures_betas_and_rate(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.5, "gblr": {"structure_lr": 0.002}}]

    def one_cycle(o: Any) -> Any:
        return nni.trace(lr_scheduler.OneCycleLR)(o, max_lr=0.01, total_steps=50)

    pruner = GBLRPruner(model, config, kit.evaluator(model, scheduler=one_cycle, lr=0.01), 1, 5)
    optimizer = built(pruner)
    assert own_group(optimizer)["max_lr"] == pytest.approx(0.002)
    pruner._fuse_preprocess(pruner.evaluator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the scheduler wants to come after a step
        pruner.evaluator._lr_schedulers[0].step()
    assert own_group(optimizer)["betas"] != (0.0, 0.999)  # what the scheduler does to every group
    optimizer.step()
    assert own_group(optimizer)["betas"] == (0.0, 0.999)
    pruner._fuse_postprocess(pruner.evaluator)


def test_several_optimizers(kit: Any) -> None:
    model = kit.MLP()
    made = [
        nni.trace(torch.optim.SGD)(model.fc3.parameters(), lr=0.1),
        nni.trace(torch.optim.AdamW)([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.01),
    ]
    config = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.6}]
    pruner = GBLRPruner(model, config, TorchEvaluator(kit.train, made, kit.training_step), 2, 10)
    pruner.compress(12, None)
    assert pruner.learner.step_count == 12
    assert pruner.learner.frozen
    assert 0.59 <= 1 - pruner.learner.relative_flops <= 0.61


@pytest.mark.parametrize("driver", [None, AGPPruner])
def test_each_optimizer_shrinks_its_own_layers_of_a_group(kit: Any, driver: Any) -> None:
    model = kit.MLP()
    made = [
        nni.trace(torch.optim.AdamW)(model.fc2.parameters(), lr=0.01),
        nni.trace(torch.optim.SGD)([*model.fc1.parameters(), *model.fc3.parameters()], lr=0.01),
    ]
    moved: list[tuple[bool, bool]] = []

    def train(model: Any, optimizers: Any, step: Any, *_: Any) -> None:
        for batch in (kit.make_batches() * 4)[:13]:
            for optimizer in optimizers:
                optimizer.zero_grad()
            step(batch, model).backward()
            for optimizer, layer, other in zip(optimizers, (model.fc2, model.fc1), (model.fc1, model.fc2), strict=True):
                before, held = layer.widths.detach().clone(), other.widths.detach().clone()
                optimizer.step()
                if not pruner.learner.frozen:
                    moved.append((not torch.equal(before, layer.widths), not torch.equal(held, other.widths)))

    config = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.6, "global_group_id": "all", "gblr_initialiser": "svd"}]
    evaluator = TorchEvaluator(train, made, kit.training_step)
    pruner = GBLRPruner(model, config, evaluator, *((2, 12) if driver is None else ()))
    (pruner if driver is None else driver(pruner, 2, 5)).compress(13, None)
    assert sum(own for own, _ in moved) > 10
    assert not any(other for _, other in moved)
    assert pruner.learner.frozen
    assert 0.59 <= 1 - pruner.learner.relative_flops <= 0.61


def test_a_parameter_at_the_top_of_the_model(kit: Any) -> None:
    class WithToken(kit.MLP):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.cls_token)

    model = WithToken()
    pruner = GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], kit.evaluator(model), 1, 5)
    pruner.compress(6, None)
    assert bool(model.cls_token.detach().abs().sum() > 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda m: nni.trace(torch.optim.AdamW)(m.named_parameters(), lr=0.1),
            "no parameter of the model that NNI can name",
        ),
        (lambda m: nni.trace(torch.optim.LBFGS)(m.parameters()), "LBFGS has no parameter groups"),
        (
            lambda m: nni.trace(torch.optim.SGD)(m.fc3.parameters(), lr=0.1),
            "layer 'fc1': its weight is in no optimizer",
        ),
    ],
)
def test_optimizers_that_would_silently_not_train_are_refused(kit: Any, make: Any, says: str) -> None:
    model = kit.MLP()
    evaluator = TorchEvaluator(kit.train, make(model), kit.training_step)
    with pytest.raises(ConfigError, match=says):
        GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], evaluator, 1, 5)
    assert type(model.fc1) is nn.Linear


def test_anything_but_an_evaluator_is_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    with pytest.raises(ConfigError, match="need an evaluator of NNI, got a AdamW"):
        GBLRPruner(model, config, torch.optim.AdamW(model.parameters()), 1, 5)


class OneOptimizer:
    """Keeps its helpers as NNI's evaluators of transformers and DeepSpeed do."""

    def __init__(self, model: nn.Module, scheduled: bool) -> None:
        made = nni.trace(torch.optim.AdamW)(model.parameters(), lr=0.1)
        self._optimizer_helper = OptimizerConstructHelper.from_trace(model, made)
        if scheduled:
            recorded = nni.trace(lr_scheduler.LambdaLR)(made, lr_lambda=[lambda step: 0.5])
            self._lr_scheduler_helper = LRSchedulerConstructHelper.from_trace(recorded)


@pytest.mark.parametrize("scheduled", [True, False])
def test_an_evaluator_with_one_optimizer(kit: Any, scheduled: bool) -> None:
    model = kit.MLP()
    evaluator: Any = OneOptimizer(model, scheduled)
    check_recorded(evaluator, ["fc1"])
    assert not is_adopted(evaluator)
    heard: list[Any] = []

    class Listener:
        def hear(self, optimizer: Any) -> None:
            heard.append(optimizer)

    listener = Listener()
    prepare(model, ["fc1"])
    adopt(evaluator, ["fc1"], None, listener.hear)
    assert is_adopted(evaluator)
    optimizer = evaluator._optimizer_helper.call(model, {name: name for name, _ in model.named_parameters()})
    assert heard == [optimizer]
    assert names_in(own_group(optimizer), model) == ["fc1.locations", "fc1.widths"]
    if scheduled:
        evaluator._lr_scheduler_helper.call(optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    del listener
    gc.collect()
    evaluator._optimizer_helper.call(model, {name: name for name, _ in model.named_parameters()})
    assert len(heard) == 1  # who is gone is not told


def test_an_evaluator_without_an_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="it has no optimizer; gblr learns the structure while the network trains"):
        check_recorded(SimpleNamespace(), ["fc1"])  # type: ignore[arg-type]
