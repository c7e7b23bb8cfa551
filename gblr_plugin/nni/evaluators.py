"""NNI's LightningEvaluator on Lightning 2.x: the small cures that it needs, and nothing else.

A compressor cures the evaluator that it is given (:func:`cure`), so that scripts keep the one that they have.

1. ``max_steps``: NNI sets an attribute that has become read-only.
2. ``configure_optimizers`` returning ``{"optimizer": ..., "lr_scheduler": scheduler}``, or scheduler tables in a second
   list.
3. ``lightning.pytorch``: NNI asks for classes of ``pytorch_lightning``, of which these are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

from nni.common import is_traceable
from nni.compression.utils import Evaluator
from nni.compression.utils import LightningEvaluator as _NNILightningEvaluator
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ._compat import record

__all__ = ["LightningEvaluator", "cure", "record_optimizers", "train_bound"]


class _Named(type):
    """A type whose instances are those of the class of this name in either Lightning package."""

    def __instancecheck__(cls, instance: Any) -> bool:
        packages = ("pytorch_lightning", "lightning")
        kinds = type(instance).__mro__
        return any(kind.__name__ == cls.__name__ and kind.__module__.partition(".")[0] in packages for kind in kinds)


_EITHER = SimpleNamespace(
    **{name: _Named(name, (), {}) for name in ("Trainer", "LightningModule", "LightningDataModule")}
)


def _for_either(name: str) -> Callable[..., Any]:
    """NNI's own method, reading ``pl`` as both packages; NNI's module is left alone."""
    method: FunctionType = getattr(_NNILightningEvaluator, name)
    seen = {**method.__globals__, "pl": _EITHER}
    copied = FunctionType(method.__code__, seen, name, method.__defaults__, method.__closure__)
    copied.__doc__ = method.__doc__
    return copied


def _is_traced(instance: Any) -> bool:
    """Whether an object was made through ``nni.trace``.

    NNI hangs its properties on the class of what it traces first, so that later objects of that class which were not
    traced have the properties but not what they read.
    """
    try:
        return bool(is_traceable(instance))
    except KeyError:
        return False


class LightningEvaluator(_NNILightningEvaluator):
    """NNI's LightningEvaluator for Lightning 2.x, as ``pytorch_lightning`` or ``lightning.pytorch``.

    With ``pytorch_lightning`` NNI's own class, and subclasses of it, do as well: compressors turn them into this one.

    Args:
        trainer: ``nni.trace(pl.Trainer)(...)``.
        data_module: ``nni.trace(YourDataModule)(...)``.
        dummy_input: Used by compressors that trace the graph.

    Raises:
        ConfigError: If one of the two was not made through ``nni.trace``.
    """

    def __init__(self, trainer: Any, data_module: Any, dummy_input: Any = None) -> None:
        for what, given, kind in (("trainer", trainer, "Trainer"), ("data_module", data_module, "LightningDataModule")):
            if not isinstance(given, getattr(_EITHER, kind)):
                raise ConfigError(f"evaluator: {what} must be a Lightning {kind}, got a {type(given).__name__}")
            if not _is_traced(given):
                raise ConfigError(
                    f"evaluator: make the {what} with nni.trace({type(given).__name__})(...): NNI makes it anew"
                )
        self.trainer = trainer
        self.data_module = data_module
        self._dummy_input = dummy_input
        self.model: Any = None
        self._ori_model_attr: dict[str, Any] = {}
        self._param_names_map: dict[str, str] | None = None
        self._initialization_complete = False

    bind_model = _for_either("bind_model")
    patch_optim_param_group = _for_either("patch_optim_param_group")
    patch_loss = _for_either("patch_loss")
    revert_loss = _for_either("revert_loss")
    patch_optimizer_step = _for_either("patch_optimizer_step")
    revert_optimizer_step = _for_either("revert_optimizer_step")
    evaluate = _for_either("evaluate")
    _patch_configure_optimizers = _for_either("_patch_configure_optimizers")
    _revert_configure_optimizers = _for_either("_revert_configure_optimizers")

    def _init_optimizer_helpers(self, pure_model: Any) -> None:
        """Record the optimizers in the one form of ``configure_optimizers`` that holds all others."""
        returned = _as_tables(pure_model.configure_optimizers())
        had_own = "configure_optimizers" in vars(pure_model)
        before = vars(pure_model).get("configure_optimizers")
        pure_model.configure_optimizers = lambda: returned
        try:
            super()._init_optimizer_helpers(pure_model)
        finally:
            if had_own:
                pure_model.configure_optimizers = before
            else:
                del pure_model.configure_optimizers

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Fit the bound model for so many optimizer steps or epochs; default: as the trainer was made."""
        trainer = self.trainer.trace_copy().get()
        trainer.num_sanity_val_steps = 0  # would run forward hooks once more
        if max_steps or max_epochs:
            trainer.fit_loop.epoch_loop.max_steps = max_steps or -1
            trainer.fit_loop.max_epochs = max_epochs or -1
        trainer.fit(self.model, self.data_module)
        self.model.trainer = None  # a model is dumped without its trainer


def cure(evaluator: Evaluator | None) -> None:
    """Let an evaluator of NNI work with Lightning 2.x, in place.

    The cures come between a user's own class and NNI's, so that methods of the user's class, and their calls of
    ``super()``, hold as they did.

    Args:
        evaluator: Of any class; only LightningEvaluators need it.
    """
    kind = type(evaluator)
    if not isinstance(evaluator, _NNILightningEvaluator) or isinstance(evaluator, LightningEvaluator):
        return
    if kind is _NNILightningEvaluator:
        evaluator.__class__ = LightningEvaluator
    else:
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        evaluator.__class__ = type(kind.__name__, (kind, LightningEvaluator), named)


def record_optimizers(evaluator: Evaluator, model: nn.Module) -> None:
    """Let an evaluator record the optimizers of a model that no compressor has touched yet.

    Args:
        evaluator: Cured first; one that has recorded them already is left alone.
        model: As the user gave it.

    Raises:
        ConfigError: If it is not an evaluator of NNI, or if an optimizer has several schedulers.
    """
    if not isinstance(evaluator, Evaluator):
        raise ConfigError(f"evaluator: need an evaluator of NNI, got a {type(evaluator).__name__}")
    cure(evaluator)
    record(evaluator, model)


def train_bound(
    evaluator: Evaluator,
    model: nn.Module,
    names: Mapping[str, str] | None = None,
    *,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    """Train a model for so many steps or epochs; the evaluator is bound to it meanwhile.

    Args:
        evaluator: Its optimizers are recorded.
        model: Trained in place.
        names: The model's names of parameters by those that were recorded, where they differ.
        max_steps: Optimizer steps.
        max_epochs: Or epochs.
    """
    evaluator.bind_model(model, names)
    try:
        evaluator.train(max_steps, max_epochs)
    finally:
        evaluator.unbind_model()


def _as_tables(returned: Any) -> Any:
    """What ``configure_optimizers`` returned, as a list of tables where a table occurs in it; otherwise as it is."""
    if isinstance(returned, Mapping):
        returned = [returned]
    if not isinstance(returned, (list, tuple)) or not returned:
        return returned
    if isinstance(returned[0], Mapping):
        return [_full_table(table) for table in returned]
    if isinstance(returned[0], Optimizer) or len(returned) != 2:
        return returned
    optimizers, schedulers = returned
    if not any(isinstance(scheduler, Mapping) for scheduler in schedulers):
        return returned
    tables = []
    for optimizer in optimizers:
        found = [table for table in map(_scheduler_table, schedulers) if table["scheduler"].optimizer is optimizer]
        if len(found) > 1:
            raise ConfigError("configure_optimizers: one scheduler an optimizer, please")
        tables.append({"optimizer": optimizer, **({"lr_scheduler": found[0]} if found else {})})
    return tables


def _scheduler_table(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}


def _full_table(table: Mapping[str, Any]) -> dict[str, Any]:
    full = dict(table)
    if full.get("lr_scheduler") is None:
        full.pop("lr_scheduler", None)
    else:
        full["lr_scheduler"] = _scheduler_table(full["lr_scheduler"])
    return full
