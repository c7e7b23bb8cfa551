"""Optimizers: a group of their own for structure parameters, and a hook that runs once per real step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigError
from .layers import GBLRLayer

__all__ = ["STRUCTURE_KEY", "StepHook", "param_groups", "split_structure_group", "structure_parameters"]

STRUCTURE_KEY = "gblr_structure"
"""Marks, as an optimizer group's key, the group that holds widths and locations."""

_STRUCTURE_BETAS = (0.0, 0.999)


def structure_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Widths and locations of every structured layer of a model, each once."""
    layers = [module for module in model.modules() if isinstance(module, GBLRLayer)]
    return [parameter for layer in layers for parameter in (layer.widths, layer.locations)]


def _structure_options(group: dict[str, Any], lr: float | Tensor | None) -> dict[str, Any]:
    """A group's options with the structure's own: betas (0, 0.999), no weight decay, no momentum (paper App. A.7)."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    own = {"betas": _STRUCTURE_BETAS, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    options.update({key: value for key, value in own.items() if key in options})
    if lr is not None:
        if "initial_lr" in options:
            options["initial_lr"] = lr
        options["lr"] = lr
    options[STRUCTURE_KEY] = True
    return options


def param_groups(model: nn.Module, *, structure_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
    """Two optimizer groups: everything else, and the structure parameters with their own options.

    Args:
        model: Holds structured layers.
        structure_lr: Learning rate of widths and locations; default ``options["lr"]`` (as in the published runs).
        **options: Options of the optimizer, e.g. ``lr`` and ``weight_decay``.

    Returns:
        Groups for any ``torch.optim`` optimizer. With optimizers that have them, the structure's group uses betas
        (0, 0.999), and no weight decay or momentum.

    Example:
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.05))  # doctest: +SKIP
    """
    structure = structure_parameters(model)
    ids = {id(parameter) for parameter in structure}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    own: dict[str, Any] = {"params": structure, "weight_decay": 0.0, STRUCTURE_KEY: True}
    if structure_lr is not None:
        own["lr"] = structure_lr
    elif "lr" in options:
        own["lr"] = options["lr"]
    if "momentum" in options:
        own["momentum"] = 0.0
    else:
        own["betas"] = _STRUCTURE_BETAS
    return [{"params": rest, **options}, own]


_SCHEDULER_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def split_structure_group(
    optimizer: Optimizer,
    structure: Iterable[nn.Parameter],
    *,
    lr: float | None = None,
    schedulers: Sequence[Any] = (),
) -> bool:
    """Move structure parameters out of an optimizer's groups into one group of their own.

    Args:
        optimizer: Changed in place; the parameters' state is kept.
        structure: Widths and locations; those that the optimizer does not hold are passed over.
        lr: Learning rate of the new group; default that of the group they came from.
        schedulers: Learning-rate schedulers of this optimizer; their per-group lists grow by a copy of the source group's
            entry, so that the new group follows the same schedule.

    Returns:
        Whether the optimizer holds any of the structure parameters.
    """
    ids = {id(parameter) for parameter in structure}
    marked = [group for group in optimizer.param_groups if group.get(STRUCTURE_KEY)]
    if marked:
        return any(id(parameter) in ids for group in marked for parameter in group["params"])
    for index, group in enumerate(list(optimizer.param_groups)):
        moved = [parameter for parameter in group["params"] if id(parameter) in ids]
        if not moved:
            continue
        before = len(optimizer.param_groups)
        names = group.get("param_names")
        if names is not None:
            pairs = list(zip(group["params"], names, strict=True))
            group["param_names"] = [name for parameter, name in pairs if id(parameter) not in ids]
            own_names = [name for parameter, name in pairs if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        new_group = {"params": moved, **_structure_options(group, lr)}
        if names is not None:
            new_group["param_names"] = own_names
        optimizer.add_param_group(new_group)
        for scheduler in schedulers:
            if scheduler is None or scheduler.optimizer is not optimizer:
                continue
            for name in _SCHEDULER_LISTS:
                values = getattr(scheduler, name, None)
                if isinstance(values, list) and len(values) == before:
                    values.append(lr if lr is not None and name in ("base_lrs", "_last_lr") else values[index])
    return any(group.get(STRUCTURE_KEY) for group in optimizer.param_groups)


class StepHook:
    """Runs a function after each step that an optimizer really took.

    ``Optimizer.register_step_post_hook`` fires for steps that a GradScaler skips inside a fused kernel, and twice for
    subclasses that call ``super().step``; per-batch callbacks count micro-batches. Wrapping ``step`` on the instance, and
    passing over steps with ``found_inf`` set, is exact for all of these.

    Args:
        optimizer: Its ``step`` is wrapped until :meth:`remove`.
        function: Called without arguments after each real step.
    """

    def __init__(self, optimizer: Optimizer, function: Callable[[], None]) -> None:
        self.optimizer = optimizer
        self._function: Callable[[], None] | None = function
        original = optimizer.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            for group in optimizer.param_groups:
                # Schedulers that cycle momentum (OneCycleLR) write to every group.
                if group.get(STRUCTURE_KEY) and "betas" in group:
                    group["betas"] = _STRUCTURE_BETAS
            result = original(*args, **kwargs)
            found_inf = getattr(optimizer, "found_inf", None)
            if self._function is not None and (found_inf is None or not float(found_inf)):
                self._function()
            return result

        self._step = step
        self._original = original
        optimizer.step = step  # type: ignore[method-assign]  # on the instance: see above

    def remove(self) -> None:
        """Stop; the optimizer's own ``step`` is restored unless something else has wrapped it meanwhile."""
        self._function = None
        if self.optimizer.__dict__.get("step") is self._step:
            if "step" in type(self.optimizer).__dict__ and getattr(self._original, "__func__", None) is getattr(
                type(self.optimizer).step, "__func__", type(self.optimizer).step
            ):
                del self.optimizer.step
            else:
                self.optimizer.step = self._original  # type: ignore[method-assign]


def check_optimized(layers: dict[str, GBLRLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raise a ConfigError naming the first layer whose widths no optimizer holds: they would silently never train."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if layer.widths.requires_grad and id(layer.widths) not in held:
            raise ConfigError(
                f"layer {name!r}: its widths are in no optimizer; build the optimizer from the model's parameters after "
                "the layers were prepared"
            )


def structure_lr(optimizer: Optimizer) -> float:
    """Present learning rate of the structure's group (0 if there is none)."""
    for group in optimizer.param_groups:
        if group.get(STRUCTURE_KEY):
            lr = group["lr"]
            return float(lr) if not isinstance(lr, torch.Tensor) else float(lr.item())
    return 0.0
