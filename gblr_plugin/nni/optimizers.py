"""The optimizers that an NNI evaluator rebuilds: structured layers' parameters in place of the weights it recorded.

An evaluator records optimizers and schedulers by the *names* of the parameters, and makes them anew for each training.
So once layers are replaced, the recorded names are rewritten, and each optimizer that is built gets another group, for
widths and locations.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nni.compression.utils import Evaluator
from nni.compression.utils.constructor_helper import LRSchedulerConstructHelper, OptimizerConstructHelper
from torch import nn
from torch.optim import LBFGS, Optimizer

from ..errors import ConfigError
from ..learning.optimizers import STRUCTURE_KEY, split_structure_group, structure_parameters
from ._compat import optimizer_helpers, recorded_groups, replace_helpers, scheduler_helpers

__all__ = ["StructuredOptimizerHelper", "StructuredSchedulerHelper", "adopt", "check_recorded", "rename_recorded"]

_RATES_PER_GROUP = ("max_lr", "base_lr", "min_lr")
_PER_GROUP = ("lr_lambda", "max_momentum", "base_momentum", *_RATES_PER_GROUP)
"""Arguments of torch's schedulers that may be lists with one entry a group."""


class StructuredOptimizerHelper(OptimizerConstructHelper):
    """Builds an optimizer anew, with structure parameters in groups of their own.

    Attributes:
        structure_lr: Learning rate of the structure's groups; ``None``: that of the group they come from.
        sources: After a build, for each new group: index of its source group, and its rate over the source's.
    """

    structure_lr: float | None
    sources: list[tuple[int, float]]
    _listeners: list[weakref.WeakMethod[Callable[[Optimizer], None]]]

    @classmethod
    def adopt(cls, helper: OptimizerConstructHelper) -> StructuredOptimizerHelper:
        """The helper of an evaluator as one of this class; itself if it is one already."""
        if isinstance(helper, cls):
            return helper
        adopted = cls.__new__(cls)
        adopted.__dict__.update(helper.__dict__)
        adopted.structure_lr, adopted.sources, adopted._listeners = None, [], []
        return adopted

    def tell(self, listener: Callable[[Optimizer], None]) -> None:
        """Call a bound method with each optimizer built from now on, as long as its object lives."""
        self._listeners.append(weakref.WeakMethod(listener))

    def rename(self, layer_names: Iterable[str]) -> None:
        """Put the parameters of structured layers where their weights are recorded."""
        groups = recorded_groups(self)
        marked = next((group for group in groups if group.get(STRUCTURE_KEY)), None)
        held = {name for group in groups for name in group["params"]}
        for layer in layer_names:
            structure = [f"{layer}.widths", f"{layer}.locations"]
            for group in groups:
                names = group["params"]
                if f"{layer}.weight" in names:
                    index = names.index(f"{layer}.weight")
                    names[index : index + 1] = [f"{layer}.U", f"{layer}.V"]
                if f"{layer}.U" in names:
                    (marked or group)["params"].extend(name for name in structure if name not in held)

    def call(self, wrapped_model: nn.Module, origin2wrapped_name_map: dict[str, str] | None) -> Optimizer:
        """Build the optimizer for a model."""
        optimizer: Optimizer = super().call(wrapped_model, origin2wrapped_name_map)
        before = len(optimizer.param_groups)
        structure = structure_parameters(wrapped_model)
        ids = {id(parameter) for parameter in structure}
        sources = [
            index
            for index, group in enumerate(optimizer.param_groups)
            if not group.get(STRUCTURE_KEY) and any(id(parameter) in ids for parameter in group["params"])
        ]
        split_structure_group(optimizer, structure, lr=self.structure_lr)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.sources = [
            (source, rate / rates[source] if rates[source] else 1.0)
            for source, rate in zip(sources, rates[before:], strict=True)
        ]
        self._listeners = [listener for listener in self._listeners if listener() is not None]
        for listener in self._listeners:
            told = listener()
            if told is not None:
                told(optimizer)
        return optimizer


class StructuredSchedulerHelper(LRSchedulerConstructHelper):
    """Builds a scheduler anew for an optimizer that has more groups than the caller's had.

    Attributes:
        optimizer_helper: Built the optimizer.
    """

    optimizer_helper: StructuredOptimizerHelper

    @classmethod
    def adopt(
        cls, helper: LRSchedulerConstructHelper, optimizer_helper: StructuredOptimizerHelper
    ) -> StructuredSchedulerHelper:
        """The helper of an evaluator as one of this class."""
        adopted = helper if isinstance(helper, cls) else cls.__new__(cls)
        adopted.__dict__.update(helper.__dict__)
        adopted.optimizer_helper = optimizer_helper
        return adopted

    def call(self, optimizer: Optimizer) -> Any:
        """Build the scheduler; lists with one entry a group grow by the entries of the new groups' sources."""
        names = list(inspect.signature(self.callable_obj).parameters)
        args = [self._grown(name, value) for name, value in zip(names, self.args)]  # noqa: B905 (fewer args than names)
        kwargs = {name: self._grown(name, value) for name, value in self.kwargs.items()}
        if "optimizer" in kwargs:
            kwargs["optimizer"] = optimizer
        else:
            args[0] = optimizer
        return self.callable_obj(*args, **kwargs)

    def _grown(self, name: str, value: Any) -> Any:
        value = copy.deepcopy(value)
        sources = self.optimizer_helper.sources
        if name not in _PER_GROUP or not sources:
            return value
        rated = name in _RATES_PER_GROUP
        if not isinstance(value, (list, tuple)):
            # One rate for all groups would override the structure's own.
            if name not in ("max_lr", "base_lr") or all(ratio == 1.0 for _, ratio in sources):
                return value
            value = [value] * (1 + max(source for source, _ in sources))
        return [*value, *(value[source] * ratio if rated else value[source] for source, ratio in sources)]


def check_recorded(evaluator: Evaluator, layer_names: Iterable[str]) -> None:
    """Raise a ConfigError where training would silently pass over a layer.

    Args:
        evaluator: Initialised with the model as it is now.
        layer_names: Layers to be structured, or structured already.

    Raises:
        ConfigError: If an optimizer records no names, has no groups, or none holds a layer's weight.
    """
    helpers = optimizer_helpers(evaluator)
    if not helpers:
        raise ConfigError("evaluator: it has no optimizer; gblr learns the structure while the network trains")
    for helper in helpers:
        name = getattr(helper.callable_obj, "__name__", str(helper.callable_obj))
        if inspect.isclass(helper.callable_obj) and issubclass(helper.callable_obj, LBFGS):
            raise ConfigError(
                f"evaluator: {name} has no parameter groups; structure parameters need a group of their own"
            )
        if not any(group["params"] for group in recorded_groups(helper)):
            raise ConfigError(
                f"evaluator: its {name} holds no parameter of the model that NNI can name; build it from "
                "model.parameters() (not named_parameters()) of this model"
            )
    recorded = {name for helper in helpers for group in recorded_groups(helper) for name in group["params"]}
    for layer in layer_names:
        if not {f"{layer}.weight", f"{layer}.U"} & recorded:
            raise ConfigError(
                f"layer {layer!r}: its weight is in no optimizer of the evaluator, so its structure would never be "
                "learned; add it to an optimizer or leave the layer out"
            )


def adopt(
    evaluator: Evaluator,
    layer_names: Iterable[str],
    structure_lr: float | None,
    listener: Callable[[Optimizer], None],
) -> None:
    """Make an evaluator build its optimizers for structured layers.

    Args:
        evaluator: Passed :func:`check_recorded`; its helpers are replaced.
        layer_names: Layers that are structured now.
        structure_lr: See :class:`StructuredOptimizerHelper`.
        listener: Bound method, told of each optimizer that is built.
    """
    layer_names = list(layer_names)
    helpers = [StructuredOptimizerHelper.adopt(helper) for helper in optimizer_helpers(evaluator)]
    for helper in helpers:
        helper.rename(layer_names)
        helper.structure_lr = structure_lr if structure_lr is not None else helper.structure_lr
        helper.tell(listener)
    schedulers = [
        StructuredSchedulerHelper.adopt(scheduler, helpers[index]) for scheduler, index in scheduler_helpers(evaluator)
    ]
    replace_helpers(evaluator, helpers, schedulers)


def rename_recorded(evaluator: Evaluator, names: Mapping[str, Iterable[str]]) -> None:
    """Put other parameters where an evaluator recorded these.

    Args:
        evaluator: Its optimizers are built from the new names from now on.
        names: Recorded name to the names that take its place, in the same group.
    """
    for helper in optimizer_helpers(evaluator):
        for group in recorded_groups(helper):
            group["params"][:] = [new for old in group["params"] for new in names.get(old, (old,))]


def is_adopted(evaluator: Evaluator) -> bool:
    """Whether the evaluator builds its optimizers for structured layers."""
    helpers = optimizer_helpers(evaluator)
    return bool(helpers) and all(isinstance(helper, StructuredOptimizerHelper) for helper in helpers)
