"""The optimizer group of structure parameters, with its own options and learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..errors import ConfigError
from ..layers import GBLRLayer

__all__ = [
    "STRUCTURE_KEY",
    "check_optimized",
    "learning_rates",
    "param_groups",
    "restore_options",
    "split_structure_group",
    "structure_parameters",
]

STRUCTURE_KEY = "gblr_structure"
"""Marks, as an optimizer group's key, the group that holds widths and locations."""

_OWN_OPTIONS: dict[str, Any] = {"betas": (0.0, 0.999), "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}


def structure_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Widths and locations of every structured layer of a model, each once."""
    layers = [module for module in model.modules() if isinstance(module, GBLRLayer)]
    return [parameter for layer in layers for parameter in (layer.widths, layer.locations)]


def _structure_options(group: dict[str, Any], ratio: float) -> dict[str, Any]:
    """A group's options with the structure's own (paper App. A.7), and its learning rates times ``ratio``."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    options.update({key: value for key, value in _OWN_OPTIONS.items() if key in options})
    for key in ("lr", "initial_lr", "max_lr", "min_lr"):
        if key in options:
            rate = options[key]
            options[key] = rate.clone() * ratio if isinstance(rate, Tensor) else rate * ratio
    options[STRUCTURE_KEY] = True
    return options


def restore_options(optimizer: Optimizer) -> None:
    """Restore the options of the structure's groups, since schedulers that cycle momentum write to every group."""
    for group in optimizer.param_groups:
        if group.get(STRUCTURE_KEY):
            group.update({key: _OWN_OPTIONS[key] for key in ("betas", "momentum") if key in group})


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
    group: dict[str, Any] = {"params": structure, **_OWN_OPTIONS, STRUCTURE_KEY: True}
    if structure_lr is not None:
        group["lr"] = structure_lr
    elif "lr" in options:
        group["lr"] = options["lr"]
    return [{"params": rest, **options}, group]


# Per-group lists of torch's schedulers, by name; whether they hold learning rates.
_SCHEDULER_LISTS = {
    "base_lrs": True,
    "_last_lr": True,
    "max_lrs": True,
    "min_lrs": True,
    "lr_lambdas": False,
    "base_momentums": False,
    "max_momentums": False,
}


def _all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and those nested in them (SequentialLR, ChainedScheduler), each once."""
    found: dict[int, Any] = {}
    for scheduler in schedulers:
        if scheduler is not None and id(scheduler) not in found:
            found[id(scheduler)] = scheduler
            found.update({id(inner): inner for inner in _all_schedulers(getattr(scheduler, "_schedulers", ()))})
    return list(found.values())


def _extend_scheduler(scheduler: Any, index: int, groups: int, ratio: float) -> None:
    """Give a scheduler of ``groups`` groups one more, which follows group ``index`` at ``ratio`` times its rate."""
    extended: list[int] = []
    for name, is_rate in _SCHEDULER_LISTS.items():
        values = getattr(scheduler, name, None)
        # Two names may share one list: it must grow once.
        if isinstance(values, list) and len(values) == groups and id(values) not in extended:
            values.append(values[index] * ratio if is_rate else values[index])
            extended.append(id(values))


def split_structure_group(
    optimizer: Optimizer,
    structure: Iterable[nn.Parameter],
    *,
    lr: float | None = None,
    schedulers: Sequence[Any] = (),
) -> bool:
    """Move structure parameters out of an optimizer's groups into groups of their own.

    Args:
        optimizer: Changed in place; the parameters' state is kept.
        structure: Widths and locations; those that the optimizer does not hold, or that have moved already, are passed
            over.
        lr: Learning rate of the new group, on the scale of the source group's base rate (the peak of a OneCycleLR; the
            present rate if no scheduler recorded a base). Under a scheduler both rates keep that ratio. Default: the
            rate of the source group.
        schedulers: Learning-rate schedulers of this optimizer; their per-group lists grow by the source group's entry,
            so that the new group follows the same schedule.

    Returns:
        Whether the optimizer holds any of the structure parameters.

    Raises:
        ConfigError: If ``lr`` is given but the source group's rate is 0, or the optimizer knows one group only.
    """
    ids = {id(parameter) for parameter in structure}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if isinstance(optimizer, LBFGS) and ids & held:
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} has no parameter groups; structure parameters need a group of "
            "their own"
        )
    followers = [scheduler for scheduler in _all_schedulers(schedulers) if scheduler.optimizer is optimizer]
    for index, group in enumerate(list(optimizer.param_groups)):
        moved = [parameter for parameter in group["params"] if id(parameter) in ids]
        if not moved or group.get(STRUCTURE_KEY):
            continue
        ratio = 1.0
        if lr is not None:
            base = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
            if base == 0:
                raise ConfigError(
                    "structure group: a learning rate of its own needs a non-zero rate of the group it comes from"
                )
            ratio = lr / base
        new_group: dict[str, Any] = {"params": moved, **_structure_options(group, ratio)}
        if "param_names" in group:
            named = list(zip(group["params"], group["param_names"], strict=True))
            group["param_names"] = [name for parameter, name in named if id(parameter) not in ids]
            new_group["param_names"] = [name for parameter, name in named if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        for scheduler in followers:
            _extend_scheduler(scheduler, index, len(optimizer.param_groups), ratio)
        optimizer.add_param_group(new_group)
    return any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])


def check_optimized(layers: dict[str, GBLRLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raise a ConfigError naming the first layer whose widths no optimizer holds: they would silently never train."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if layer.widths.requires_grad and id(layer.widths) not in held:
            raise ConfigError(
                f"layer {name!r}: its widths are in no optimizer; build the optimizer from the model's parameters "
                "after the layers were prepared"
            )


def learning_rates(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[float | None]:
    """Present learning rate of each parameter in an optimizer; ``None`` for those it does not hold."""
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return [float(rates[id(parameter)]) if id(parameter) in rates else None for parameter in parameters]
