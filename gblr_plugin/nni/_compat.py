"""The private names of NNI 3.0 that this bridge reads, in one place; each function says what it stands for.

Methods that subclasses of NNI's classes are to override are private by name too; those stand in the subclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nni.compression.utils import Evaluator, TorchEvaluator
from nni.compression.utils.constructor_helper import OptimizerConstructHelper
from torch import nn

__all__ = [
    "is_wrapped",
    "optimizer_helpers",
    "parameter_names",
    "present_goal",
    "record",
    "recorded_groups",
    "replace_helpers",
    "scheduler_helpers",
    "several_if_given_so",
    "training_step",
    "wrapper_of",
]


def record(evaluator: Evaluator, model: nn.Module) -> None:
    """Let an evaluator record its optimizers by the names of a model's parameters, unless it has done so already."""
    if not evaluator._initialization_complete:
        evaluator._init_optimizer_helpers(model)


def optimizer_helpers(evaluator: Evaluator) -> list[OptimizerConstructHelper]:
    """What an evaluator builds its optimizers anew from, once they are recorded."""
    several = getattr(evaluator, "_optimizer_helpers", None)  # TorchEvaluator, LightningEvaluator
    if several is not None:
        return list(several)
    single = getattr(evaluator, "_optimizer_helper", None)  # TransformersEvaluator, DeepspeedTorchEvaluator
    return [] if single is None else [single]


def scheduler_helpers(evaluator: Evaluator) -> list[tuple[Any, int]]:
    """What an evaluator builds its schedulers anew from, each with the index of its optimizer."""
    if hasattr(evaluator, "_lr_scheduler_helpers"):
        return [(helper, evaluator._lrs_opt_map[index]) for index, helper in enumerate(evaluator._lr_scheduler_helpers)]
    single = getattr(evaluator, "_lr_scheduler_helper", None)
    return [] if single is None else [(single, 0)]


def replace_helpers(evaluator: Evaluator, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
    """Let an evaluator build its optimizers and schedulers from other helpers, in the same order."""
    if hasattr(evaluator, "_optimizer_helpers"):
        evaluator._optimizer_helpers, evaluator._lr_scheduler_helpers = list(optimizers), list(schedulers)
    else:
        evaluator._optimizer_helper = optimizers[0]
        if schedulers:
            evaluator._lr_scheduler_helper = schedulers[0]


def recorded_groups(helper: OptimizerConstructHelper) -> list[dict[str, Any]]:
    """The parameter groups of a recorded optimizer, which hold names in place of parameters."""
    groups: list[dict[str, Any]] = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
    return groups


def training_step(evaluator: TorchEvaluator) -> Any:
    """The training step that a TorchEvaluator was made with."""
    return evaluator._ori_training_step


def several_if_given_so(evaluator: TorchEvaluator, optimizers: list[Any], schedulers: list[Any]) -> tuple[Any, Any]:
    """Optimizers and schedulers as a TorchEvaluator's training function takes them.

    Lists where the evaluator was given lists, single objects where it was given these, ``None`` for no scheduler.
    """
    optimizer = optimizers[0] if evaluator._train_with_single_optimizer else optimizers
    if not schedulers:
        return optimizer, None
    return optimizer, schedulers[0] if evaluator._train_with_single_scheduler else schedulers


def is_wrapped(compressor: Any) -> bool:
    """Whether a compressor's wrappers stand in its model at present."""
    return bool(compressor._is_wrapped)


def wrapper_of(module: nn.Module) -> Any | None:
    """The wrapper that a compressor has put around a module, or ``None``."""
    return getattr(module, "_nni_wrapper", None)


def present_goal(pruner: Any, layer: str, target: str, key: str) -> float:
    """The value of a goal, such as ``sparse_ratio``, that a pruner follows at present."""
    return float(getattr(pruner._target_spaces[layer][target], key))


def parameter_names(compressor: Any) -> Any:
    """The names of a wrapped model's parameters by those of the model, as ``bind_model`` takes them."""
    return compressor._get_param_names_map()
