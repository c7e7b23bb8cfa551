"""A callback for the ``Trainer`` of transformers that learns block structures; its checkpoints hold the learner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..layers.checkpoint import match_checkpoint
from ..learning.goals import LayerGoal
from ..learning.learner import StructureLearner
from ..learning.optimizers import split_structure_group
from ..learning.schedule import Schedule
from ..surgery.conversion import prepare
from ..surgery.layer_settings import DENSE, LayerSettings
from ..surgery.row_splits import RowSplits
from ..surgery.selection import Pattern
from ..utils.optional_imports import quiet_import
from ..utils.validation import check_number, is_whole

with quiet_import("gblr_plugin.huggingface.trainer", "transformers 5.14", "transformers>=5.14,<6"):
    from transformers import TrainerCallback

__all__ = ["GBLRTrainerCallback"]

_logger = logging.getLogger(__name__)

_LEARNER = "gblr_learner"  # key of the learner's state in the first group of a saved optimizer
_GROUP = "gblr"  # of all layers, which share a budget


class GBLRTrainerCallback(TrainerCallback):
    """Learns the structure of a model's layers while the ``Trainer`` of transformers trains it.

    The layers are replaced when the ``Trainer`` is made, before its optimizer. After each optimizer step the learner
    takes its step; from the cool-down on the structure is frozen within the budget. A checkpoint holds the learner's
    state within the optimizer's, so that ``train(resume_from_checkpoint=...)`` goes on to the bit. Afterwards
    :func:`gblr_plugin.convert` freezes the weights.

    Args:
        budget: Relative FLOPs of the structured layers to end at, in (0, 1]; lambda is found.
        threshold: Alternatively a fixed lambda.
        layers: Full names, glob patterns or types; default: every layer that can gain, see
            :func:`~gblr_plugin.surgery.selection.select_layers`. Layers that are structured already are driven as they
            are.
        exclude: The same kinds of patterns, taken away again.
        settings: How layers start; default ``LayerSettings("dense")`` with a budget and ``LayerSettings("svd")``
            without.
        row_splits: See :func:`gblr_plugin.prepare`.
        group: Whether the layers share one budget; else each has its own.
        warmup: Optimizer steps before anything shrinks, or as a float a fraction of all steps.
        cooldown: Step, or fraction of all, at which the structure is frozen; default 0.5 where dense weights are
            decomposed then, else 0.8.
        structure_lr: Learning rate of widths and locations; default that of the weights.

    Attributes:
        learner: The :class:`~gblr_plugin.StructureLearner`; ``None`` before training.

    Raises:
        ConfigError: For an argument out of range, or as :func:`gblr_plugin.prepare`.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[GBLRTrainerCallback(0.5)])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> gblr_plugin.convert(model).save_pretrained("compressed")  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: float | None = None,
        threshold: float | None = None,
        *,
        layers: Iterable[Pattern] | None = None,
        exclude: Iterable[Pattern] = (),
        settings: LayerSettings | None = None,
        row_splits: RowSplits | None = None,
        group: bool = True,
        warmup: int | float = 0.05,
        cooldown: int | float | None = None,
        structure_lr: float | None = None,
    ) -> None:
        self._goal = LayerGoal(budget, threshold, group=_GROUP if group else None)
        self._settings = settings or LayerSettings(DENSE if budget is not None else "svd")
        if cooldown is None:
            cooldown = 0.5 if self._settings.initialiser == DENSE else 0.8
        for name, moment in (("warmup", warmup), ("cooldown", cooldown)):
            check_number(f"trainer callback: {name}", moment, "[0, inf)" if is_whole(moment) else "[0, 1]")
        if structure_lr is not None:
            check_number("trainer callback: structure_lr", structure_lr, "(0, inf)")
        self._include, self._exclude, self._row_splits = layers, exclude, row_splits
        self._warmup, self._cooldown, self._structure_lr = warmup, cooldown, structure_lr
        self._layers: dict[str, GBLRLayer] = {}
        self.learner: StructureLearner | None = None
        self._hook: Any = None
        self._scheduler: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace layers, before the optimizer is made."""
        model = kwargs["model"]
        self._layers = _structured(model)
        if not self._layers:
            prepare(model, self._include, self._exclude, self._settings, row_splits=self._row_splits)

        def match(module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
            match_checkpoint(module, state_dict, lambda name, dense: self._settings.align)

        def train_structure(module: nn.Module, *_: Any) -> None:
            for layer in _structured(module).values():  # the optimizer is made of what trains, as it was first made
                layer.widths.requires_grad_(True)
                layer.locations.requires_grad_(True)

        model.register_load_state_dict_pre_hook(match)
        model.register_load_state_dict_post_hook(train_structure)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer exists now, and what a checkpoint holds is loaded.

        Raises:
            ConfigError: If a checkpoint was made without this callback, or the optimizer lacks the layers' parameters.
        """
        self._layers = _structured(kwargs["model"])
        optimizer: Optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps both
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        warmup, cooldown = (_step(moment, state.max_steps) for moment in (self._warmup, self._cooldown))
        schedule = Schedule(warmup, max(cooldown, warmup + 1))
        goals = dict.fromkeys(self._layers, self._goal)
        self.learner = StructureLearner(self._layers, goals, schedule, diagnostics=args.output_dir)
        saved = optimizer.param_groups[0].pop(_LEARNER, None)
        if saved is not None:
            self.learner.load_state_dict(saved)
        elif state.global_step:
            raise ConfigError("trainer callback: the checkpoint holds no learner; it was made without this callback")
        originals = [dict(group) for group in optimizer.param_groups]
        structure = [values for layer in self._layers.values() for values in (layer.widths, layer.locations)]
        # The scheduler may have been made for accelerate's optimizer, which passes on what is asked of it.
        split_structure_group(scheduler.optimizer, structure, lr=self._structure_lr, schedulers=[scheduler])
        self._hook = optimizer.register_state_dict_post_hook(partial(_as_made, self.learner, originals))
        self._scheduler = scheduler  # whose state has no hook
        scheduler.state_dict = partial(_of_groups, scheduler.state_dict, len(originals), len(optimizer.param_groups))
        self.learner.attach_all([optimizer])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the relative FLOPs and the smoothness to what is logged."""
        if self.learner is not None and logs is not None:
            layer = next(iter(self._layers.values()))
            values = {"gblr/relative_flops": self.learner.relative_flops, "gblr/sigma": layer.sigma or float("inf")}
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was; say so if training ended before the cool-down."""
        assert self.learner is not None
        self.learner.detach()
        self._hook.remove()
        del self._scheduler.state_dict
        if not self.learner.frozen:
            _logger.warning(
                "training ended at step %d, before the cool-down: the structure is not frozen and the budget not met; "
                "resume, or call callback.learner.freeze()",
                self.learner.step_count,
            )


def _structured(model: nn.Module) -> dict[str, GBLRLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GBLRLayer)}


def _step(moment: int | float, total: int) -> int:
    return moment if isinstance(moment, int) else round(moment * total)


def _as_made(
    learner: StructureLearner, originals: list[dict[str, Any]], optimizer: Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's state in the groups in which the ``Trainer`` makes it anew, with the learner's state.

    Args:
        learner: Its state goes into the first group, which ``load_state_dict`` keeps as it is.
        originals: Groups before those of the structure were split off.
        optimizer: The optimizer.
        state: What its ``state_dict`` returns.
    """
    present = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter for group in originals for parameter in group["params"]]
    if {id(parameter) for parameter in before} != {id(parameter) for parameter in present}:
        return state
    index = {id(parameter): number for number, parameter in enumerate(present)}
    groups, first = [], 0
    for group, original in zip(state["param_groups"], originals, strict=False):
        size = len(original["params"])
        groups.append({**group, "params": list(range(first, first + size))})
        first += size
    groups[0][_LEARNER] = learner.state_dict()
    entries = {number: state["state"].get(index[id(parameter)]) for number, parameter in enumerate(before)}
    return {**state, "state": {n: entry for n, entry in entries.items() if entry is not None}, "param_groups": groups}


def _of_groups(state_dict: Callable[[], dict[str, Any]], before: int, present: int) -> dict[str, Any]:
    """A scheduler's state for the groups before those of the structure, which come last."""
    state = {name: value for name, value in state_dict().items() if name != "state_dict"}
    return {
        name: value[:before] if isinstance(value, list) and len(value) == present else value
        for name, value in state.items()
    }
