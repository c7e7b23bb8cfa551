"""Calibration batches from NNI's evaluators: training data passed through the model before anything is trained."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from nni.compression.utils import Evaluator, TorchEvaluator
from torch import nn
from torch.utils._pytree import tree_map

from ..calibration.allocation import allocate, check_rule
from ..calibration.batches import Calibration, CalibrationSettings
from ..errors import ConfigError
from ..layers.dense import can_gain
from ..utils.random_state import accelerators_of, keep_random_state
from ._compat import optimizer_helpers, scheduler_helpers, several_if_given_so, training_step
from .evaluators import LightningEvaluator
from .settings import LayerConfig

__all__ = ["allocated_budgets", "calibration_data"]


class _EnoughError(Exception):
    """Ends a training function once its batches were seen."""


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers, training modes and the random state of torch as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in gradients:
            parameter.grad = None
        with keep_random_state(accelerators_of(model)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")  # a training step outside of its trainer
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def calibration_data(evaluator: Evaluator | None, model: nn.Module, settings: CalibrationSettings) -> Calibration:
    """The first training batches of an evaluator, and its training step.

    A TorchEvaluator's training function is run for so many batches with an optimizer that holds none of the model's
    parameters; of a LightningEvaluator the data module is asked. The model is as before on return.

    Args:
        evaluator: TorchEvaluator or LightningEvaluator.
        model: The model that it trains.
        settings: Number of batches, damping, order.

    Returns:
        Batches whose ``forward`` is the training step, in evaluation mode, and whose ``mask`` their ``attention_mask``.

    Raises:
        ConfigError: Without evaluator, of another kind, or without batches.
    """
    if evaluator is None:
        raise ConfigError("calibration: it takes training batches from the evaluator; give one")
    with _unchanged(model):
        if isinstance(evaluator, LightningEvaluator):
            batches, forward = _of_lightning(evaluator, settings.batches)
        elif isinstance(evaluator, TorchEvaluator):
            batches, forward = _of_torch(evaluator, model, settings.batches)
        else:
            raise ConfigError(
                f"calibration: need a TorchEvaluator or LightningEvaluator, got a {type(evaluator).__name__}"
            )
    if not batches:
        raise ConfigError("calibration: the evaluator's training data has no batches")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches = [tree_map(lambda v: v.to(device) if hasattr(v, "to") else v, batch) for batch in batches]

    def unchanging(net: nn.Module, batch: Any) -> object:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")
            return forward(net, batch)

    return Calibration(batches, unchanging, damping=settings.damping, sequential=settings.sequential)


def _of_lightning(evaluator: LightningEvaluator, count: int) -> tuple[list[Any], Callable[[Any, Any], object]]:
    data = evaluator.data_module
    data.prepare_data()
    data.setup("fit")

    def forward(module: Any, batch: Any) -> object:
        step = module.training_step
        return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)

    return list(islice(iter(data.train_dataloader()), count)), forward


def _of_torch(
    evaluator: TorchEvaluator, model: nn.Module, count: int
) -> tuple[list[Any], Callable[[Any, Any], object]]:
    batches: list[Any] = []
    step = training_step(evaluator)

    def recording(batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(batch)
        if len(batches) >= count:
            raise _EnoughError
        return step(batch, *args, **kwargs)

    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0) for _ in optimizer_helpers(evaluator)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda _: 1.0) for _ in scheduler_helpers(evaluator)]
    optimizer, scheduler = several_if_given_so(evaluator, optimizers, schedulers)
    with suppress(_EnoughError):
        evaluator.training_func(model, optimizer, recording, scheduler, count, None)
    return batches, lambda net, batch: step(batch, net)


def allocated_budgets(
    model: nn.Module,
    config: Mapping[str, LayerConfig],
    budgets: Mapping[str, float | None],
    calibration: Calibration | None,
    default: str | None = "sensitivity",
) -> dict[str, float]:
    """Budgets of the layers of groups, split by the rule that their entries name.

    Args:
        model: Where the layers are.
        config: What the config list says, by layer.
        budgets: Relative FLOPs of each layer before; one for all layers of a group.
        calibration: Batches, where there are any.
        default: Rule of groups that name none, where there are batches; ``None`` leaves them as they are.

    Returns:
        By name, for the layers of those groups that can gain at all.

    Raises:
        ConfigError: See :func:`gblr_plugin.calibration.allocation.allocate`; also if a group's layers start at
            different budgets.
    """
    groups: dict[Any, dict[str, LayerConfig]] = {}
    for name, layer in config.items():
        asked = layer.allocation is not None or (calibration is not None and default is not None)
        if layer.goal.group is not None and asked and can_gain(layer.module, layer.settings.row_splits):
            groups.setdefault(layer.goal.group, {})[name] = layer
    found: dict[str, float] = {}
    for group, layers in groups.items():
        first, layer = next(iter(layers.items()))
        rule, budget = layer.allocation or default, budgets[first]
        assert rule is not None
        check_rule(rule, calibration)
        other = next((name for name in layers if budgets[name] != budget), None)
        if budget is None or other is not None:
            if layer.allocation is None:
                continue
            raise ConfigError(
                f"layer {other or first!r}: allocation splits one starting budget of global_group_id {group!r}: use an "
                "initialiser that starts at a budget (gblr, trapezoid, ...) and the same start_budget in every entry"
            )
        found |= allocate(
            model,
            {name: layer.module for name, layer in layers.items()},
            budget,
            rule,
            calibration=calibration,
            bounds={name: (layer.goal.min_flops, layer.goal.max_flops) for name, layer in layers.items()},
            row_splits={name: layer.settings.row_splits for name, layer in layers.items()},
        )
    return found
