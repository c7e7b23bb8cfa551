"""A Lightning callback that learns block structures, logs them and draws them; no NNI evaluator is needed."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..families.layers import FamilyLayer
from ..layers import GBLRLayer, StructuredLayer
from ..layers.checkpoint import match_checkpoint
from ..layers.separation import separated
from ..learning.goals import LayerGoal
from ..learning.learner import StructureLearner
from ..learning.optimizers import split_structure_group
from ..learning.pace import FactorPace
from ..learning.schedule import Schedule
from ..serialization.families import family_record
from ..surgery.conversion import prepare_layers, split_by_family
from ..surgery.layer_settings import DENSE, FamilySettings, LayerSettings
from ..surgery.patterns import as_patterns, matches
from ..surgery.row_splits import RowSplits, check_row_splits_given, row_splits_of
from ..surgery.selection import Pattern, log_skipped, select_layers
from ._compat import averages_weights, is_driven_by_nni, loaded_checkpoint, schedulers_of, shards_parameters, state_key
from .base import Callback
from .checkpoint import match_families
from .reporter import StructureLog, log_pictures
from .resuming import DataPosition
from .settings import check_moment, read_options

__all__ = ["GBLRCallback"]

_logger = logging.getLogger(__name__)

_POSITION = "gblr_place"  # key of the position in the data in a checkpoint
_FAMILIES = "gblr_families"  # key of the records of families' layers in a checkpoint
_SHARED = "gblr"  # name of the group of all layers, where they share a budget
_WARMUP, _COOLDOWN = 0.05, 0.8  # fractions of all steps
_DECOMPOSED = 0.5  # the same, where dense weights are decomposed


class GBLRCallback(Callback):
    """Learns the structure of a model's layers while a Trainer trains it.

    When fitting begins, before optimizers are made, the callback replaces the chosen dense layers by structured ones.
    By default these train as dense weights until the cool-down and are then decomposed at the budget, see
    :class:`~gblr_plugin.learning.decomposing.Decomposer`: right for a training from scratch. ``initialiser="gblr"``
    decomposes them before the first step and freezes their structure: right for a network that is trained already.
    With ``initialiser="svd"``, as published, their intervals are learned: widths and locations get an optimizer group
    of their own, and after each real optimizer step the widths shrink towards the budget. From the cool-down on the
    structure is frozen as exact boxcars, so that what is trained then is what is counted, converted and deployed. Works
    with ``pytorch_lightning`` and ``lightning.pytorch``.

    With ``family`` it replaces them by layers of another structure family at the budget, whose structure is fixed and
    whose factors train: there is no learner, and nothing is shrunk or frozen.

    With neither ``budget`` nor ``threshold`` it only watches structured layers that are already there and that
    something else drives (the NNI pruner), or that are fixed: it logs and draws, and changes nothing. Tell it the
    driving learner with :meth:`watch`, and it logs lambda too.

    Args:
        budget: Relative FLOPs of the structured layers to end at, in (0, 1]; lambda is found automatically.
        threshold: Alternatively a fixed lambda, as published.
        layers: Full names (of the LightningModule's submodules), glob patterns over names, or types and their names.
            Default: every layer that can be structured and made cheaper; tied weights and output heads stay dense, as
            :func:`~gblr_plugin.surgery.selection.select_layers` says, and what stays dense is logged. If the model has
            structured layers already (from :func:`gblr_plugin.prepare`), those are driven as they are; frozen ones go
            on from their structure.
        exclude: The same kinds of patterns, taken away again.
        group: Whether the layers share one budget, so that the structure decides who spends it (with ``family`` the
            family's own rule, if it has one); else each has its own.
        warmup: Optimizer steps before anything shrinks; a float in [0, 1] is a fraction of the total number of steps.
        cooldown: Optimizer step, or fraction of the total, at which the budget is met and the structure is frozen;
            default 0.5 where dense weights are decomposed then, else 0.8.
        **options: Fields of :class:`~gblr_plugin.LayerSettings`, which say how layers start: ``initialiser``,
            ``num_components``, ``row_splits`` (also by pattern or ``"auto"``, as in :func:`gblr_plugin.prepare`),
            ``align``, ``seed``, and ``initial_budget``, the relative FLOPs that the initialiser starts at (default:
            full widths for ``"svd"`` and ``"random"``, ``budget`` for others). The initialiser is ``"dense"`` by
            default, and ``"svd"`` with a threshold, ``num_components`` or ``initial_budget``. And fields of
            :class:`~gblr_plugin.lightning.settings.CallbackSettings`: ``structure_lr``, the learning rate of widths
            and locations; ``log_every_n_steps``, ``picture_every_n_epochs``, ``picture_every_n_steps`` and
            ``picture_size``; ``pace``, ``compact``, ``freeze_at_end``, ``non_finite`` and ``replay``; ``family`` and
            ``family_options``, with which only ``pace``, ``row_splits`` and those about logs, pictures and data can be
            used.

    Attributes:
        learner: The :class:`~gblr_plugin.StructureLearner` at work, or watched; ``None`` before fitting, and with
            ``family``.
        history: ``{"relative_flops": [(step, value), ...], "sigma": ..., ...}`` of all layers together, as logged;
            steps are the learner's, where it is known.

    Logs ``gblr/relative_flops``, ``gblr/live_components``, ``gblr/mean_row_width``, ``gblr/mean_column_width``
    (fractions of the axis, over live components), ``gblr/sigma``, ``gblr/lambda`` (mean over layers), ``gblr/frozen``,
    and the same per layer as ``gblr_layers/<layer>/...``; layers without components have relative FLOPs alone. The
    progress bar shows them as ``rel_flops`` and ``sigma`` (infinite: exact boxcar); ``trainer.callback_metrics`` holds
    ``gblr/relative_flops`` and ``gblr/sigma`` for other callbacks to monitor. Of several callbacks in one Trainer, each
    with its own ``layers`` (or ``exclude``) and budget, the second's totals are ``gblr_2/...``.

    A checkpoint taken before the freeze holds a larger network with smooth masks: let ``ModelCheckpoint`` keep the last
    one, or compare only what came after. DDP needs no option. Under ``ModelParallelStrategy`` (FSDP2) prepare and shard
    the layers in ``configure_model``; strategies that shard parameters out of sight are refused.

    Raises:
        ConfigError: For arguments out of range; in ``setup`` for unknown layers or a sharded strategy; when fitting
            starts, for widths that are in no optimizer, or steps that cannot be counted (give ``warmup`` and
            ``cooldown`` as integers then).

    Example:
        >>> trainer = pl.Trainer(max_epochs=20, callbacks=[GBLRCallback(budget=0.25)])  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> gblr_plugin.convert(module)  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: float | None = None,
        threshold: float | None = None,
        *,
        layers: Iterable[Pattern] | None = None,
        exclude: Iterable[Pattern] = (),
        group: bool = True,
        warmup: int | float = _WARMUP,
        cooldown: int | float | None = None,
        **options: Any,
    ) -> None:
        self.monitor_only = budget is None and threshold is None
        if not self.monitor_only:
            LayerGoal(budget, threshold)  # checks both
        self._budget, self._threshold = budget, threshold
        self._include = None if layers is None else as_patterns("callback: layers", layers)
        self._exclude = as_patterns("callback: exclude", exclude)
        self._group = group
        self._settings, self._of_layers = read_options(options, budget, drives=not self.monitor_only)
        given = warmup, cooldown
        if cooldown is None:
            cooldown = _DECOMPOSED if self._of_layers.get("initialiser") == DENSE else _COOLDOWN
        self._warmup, self._cooldown = check_moment("warmup", warmup), check_moment("cooldown", cooldown)
        if type(warmup) is type(cooldown) and warmup >= cooldown:
            raise ConfigError(f"callback: warmup must be less than cooldown, got {warmup} and {cooldown}")
        self._row_splits: RowSplits = self._of_layers.pop("row_splits", 1)
        check_row_splits_given("callback: row_splits", self._row_splits)
        self._drives = not self.monitor_only and self._settings.family is None
        if self._settings.family is not None and given != (_WARMUP, None):
            raise ConfigError(
                f"callback: family {self._settings.family!r} has a fixed structure; leave warmup and cooldown out"
            )

        self.learner: StructureLearner | None = None
        self._layers: dict[str, StructuredLayer] = {}
        self._pace: FactorPace | None = None  # of a family's factors; a learner has its own
        self._total_steps: int | None = None
        self._restored: dict[str, Any] | None = None
        self._checkpoint_hook: Any = None
        self._position = DataPosition(self._settings.replay)
        self._log = StructureLog(self._settings.log_every_n_steps, self._settings.picture_every_n_steps)
        self._frozen_at: list[tuple[Tensor, Tensor]] = []
        self._was_frozen = False

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Curves of all layers together by name, (step, value) each."""
        return self._log.history

    def watch(self, learner: StructureLearner) -> None:
        """Log the lambdas of a learner that something else drives (``pruner.learner``).

        Raises:
            ConfigError: If the callback drives structures itself.
        """
        if not self.monitor_only:
            raise ConfigError(
                "callback: it has a budget or threshold and drives structures itself; it cannot watch too"
            )
        self.learner = learner

    # -- setting up --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replace layers, before the model moves to its device and before optimizers are made."""
        if stage == "fit" and not self.monitor_only:
            self._check_trainer(trainer)
            pl_module.configure_model()  # a model that is built there; Lightning asks that a second call does nothing
            self._layers = self._existing(pl_module)
            if self._drives and (self.learner is None or not _same(self.learner.layers, self._layers)):
                for layer in self._gblr_layers().values():  # before optimizers look which parameters train
                    if layer.structure_frozen:
                        layer.unfreeze_structure()
            if not self._layers:
                self._check_order(trainer)
                with separated(pl_module):
                    self._layers = self._prepare(pl_module)
        if self._checkpoint_hook is None:
            siblings = self._siblings(trainer)

            def align(name: str, module: nn.Module) -> int | tuple[int, int]:
                chooser = next((callback for callback in siblings if callback._chooses(name, module)), self)
                found: int | tuple[int, int] = chooser._of_layers.get("align", 1)
                return found

            def match(module: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
                match_checkpoint(module, state, align)
                self._match_families(module, state, loaded_checkpoint(trainer))

            self._checkpoint_hook = pl_module.register_load_state_dict_pre_hook(match)

    def _match_families(self, module: nn.Module, state: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        records = checkpoint.get(_FAMILIES, {})
        made = self._layers if checkpoint and self._settings.family is not None else {}
        for name, layer in made.items():
            if isinstance(layer, FamilyLayer) and name not in records:
                raise ConfigError(
                    f"layer {name!r}: the checkpoint does not say which structure of family "
                    f"{layer.structure_name!r} it has; it must be saved beside GBLRCallback, with save_weights_only off"
                )
        match_families(module, state, records)

    def _check_trainer(self, trainer: Any) -> None:
        strategy = shards_parameters(trainer)
        if strategy:
            raise ConfigError(f"callback: {strategy} shards parameters, which structure learning cannot follow")
        averaging = next(filter(None, map(averages_weights, trainer.callbacks)), None)
        if averaging and self._of_layers.get("initialiser") == DENSE:
            raise ConfigError(
                f"callback: {averaging} would average dense weights with the factors they become; choose another "
                "initialiser than 'dense', such as 'gblr'"
            )
        if self._settings.compact and averaging:
            raise ConfigError(
                f"callback: {averaging} holds parameters of the shapes before compaction; leave compact off"
            )

    def _check_order(self, trainer: Any) -> None:
        """Refuse to prepare a model that was sharded or copied before."""
        if type(trainer.strategy).__name__ == "ModelParallelStrategy":
            raise ConfigError(
                "callback: under ModelParallelStrategy call gblr_plugin.prepare, then fully_shard, in configure_model"
            )
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        averaging = next(filter(None, map(averages_weights, before)), None)
        if averaging:
            raise ConfigError(
                f"callback: {averaging} copies the model before it is structured; put GBLRCallback before it"
            )

    def _siblings(self, trainer: Any) -> list[GBLRCallback]:
        """The Trainer's callbacks of this kind, each with layers of its own; the first does what is done once."""
        return [callback for callback in trainer.callbacks if isinstance(callback, GBLRCallback)] or [self]

    def _is_first(self, trainer: Any) -> bool:
        return self._siblings(trainer)[0] is self

    def _chooses(self, name: str, module: nn.Module) -> bool:
        included = self._include is None or any(matches(pattern, name, module) for pattern in self._include)
        return included and not any(matches(pattern, name, module) for pattern in self._exclude)

    def _existing(self, pl_module: nn.Module) -> dict[str, StructuredLayer]:
        found = {
            name: module
            for name, module in pl_module.named_modules()
            if isinstance(module, GBLRLayer if self._drives else StructuredLayer) and self._chooses(name, module)
        }
        family = self._settings.family
        for name, layer in found.items():
            if family is not None and (layer.structure_name != family or not layer.structure_frozen):
                kind = f"a {layer.structure_name} layer" + ("" if layer.structure_frozen else " that learns")
                raise ConfigError(f"layer {name!r}: it is {kind} already, not one of family {family!r}; exclude it")
            if self._drives and is_driven_by_nni(layer):
                raise ConfigError(
                    f"layer {name!r}: an NNI pruner drives it already; give the callback neither budget nor threshold "
                    "and it only watches"
                )
        return found

    def _prepare(self, pl_module: nn.Module) -> dict[str, StructuredLayer]:
        """Put layers of the family, or GBLR layers that learn their structure, in place of the chosen dense ones."""
        selection = select_layers(pl_module, self._include, self._exclude)
        log_skipped(selection.skipped)
        splits = row_splits_of(pl_module, selection.layers, self._row_splits)
        if self._settings.family is not None:
            assert self._budget is not None  # checked with the options
            setting = FamilySettings(self._settings.family, self._budget, 1, self._settings.family_options)
            if self._group:
                return prepare_layers(pl_module, split_by_family(selection.layers, setting, splits))
            each = {name: replace(setting, row_splits=count) for name, count in splits.items()}
            return prepare_layers(pl_module, each)
        return prepare_layers(
            pl_module, {name: LayerSettings(**self._of_layers, row_splits=count) for name, count in splits.items()}
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers exist now, and a checkpoint's weights are loaded, but not yet its optimizer state."""
        self._release_checkpoint_hook()
        if self._is_first(trainer):
            self._position.fit_begins(trainer)
        restored, self._restored = self._restored, None
        if restored is not None:
            curves = restored["history"].items()
            self._log.history = {name: [(step, value) for step, value in curve] for name, curve in curves}
        # Layers may have been replaced since: a checkpoint that fitted another size, or a model built anew.
        present = self._existing(pl_module)
        if self.monitor_only and not present:
            raise ConfigError(
                "callback: the model has no structured layers to watch; give a budget or threshold to structure it"
            )
        missing = next((name for name in self._layers if name not in present), None)
        if missing is not None and not self.monitor_only:
            raise ConfigError(
                f"layer {missing!r}: it was replaced after the callback structured it; build the model in __init__, or "
                "in a configure_model that does nothing when called again"
            )
        self._layers = present
        if self._drives:
            if self.learner is None or restored is not None or not _same(self.learner.layers, self._layers):
                self.learner = self._new_learner(trainer, restored)
            self._attach(self.learner, trainer)
        elif self._settings.family is not None:
            self._pace = FactorPace(list(self._layers.values()), self._settings.pace or 1.0)
            for optimizer in trainer.optimizers:
                self._pace.follow(optimizer)
        self._was_frozen = self._frozen()

    def _gblr_layers(self) -> dict[str, GBLRLayer]:
        return {name: layer for name, layer in self._layers.items() if isinstance(layer, GBLRLayer)}

    def _attach(self, learner: StructureLearner, trainer: Any) -> None:
        structure = [
            parameter for layer in self._gblr_layers().values() for parameter in (layer.widths, layer.locations)
        ]
        schedulers = schedulers_of(trainer)
        for optimizer in trainer.optimizers:
            split_structure_group(optimizer, structure, lr=self._settings.structure_lr, schedulers=schedulers)
        learner.attach_all(list(trainer.optimizers))

    def _new_learner(self, trainer: Any, restored: Mapping[str, Any] | None) -> StructureLearner:
        if restored is not None:
            self._total_steps = restored["total_steps"]
        elif isinstance(self._warmup, float) or isinstance(self._cooldown, float):
            total = trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise ConfigError(
                    "callback: the Trainer's number of steps is unknown (set max_epochs or max_steps), so give warmup "
                    "and cooldown as integers"
                )
            self._total_steps = int(total)
        warmup, cooldown = (self._step(point) for point in (self._warmup, self._cooldown))
        goal = LayerGoal(self._budget, self._threshold, group=_SHARED if self._group else None)
        if isinstance(self._warmup, float) and isinstance(self._cooldown, float):
            cooldown = max(cooldown, warmup + 1)  # fractions of a very short training may round to one step
        goals, schedule = dict.fromkeys(self._layers, goal), Schedule(warmup, cooldown)
        learner = StructureLearner(
            self._gblr_layers(),
            goals,
            schedule,
            pace=self._settings.pace,
            compact=self._settings.compact,
            non_finite=self._settings.non_finite,
            diagnostics=trainer.default_root_dir,
        )
        if restored is not None and restored["learner"] is not None:
            learner.load_state_dict(restored["learner"])
        return learner

    def _step(self, point: int | float) -> int:
        return point if isinstance(point, int) else round(point * (self._total_steps or 0))

    # -- watching ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on where a checkpoint stopped in the data; log and draw where training starts."""
        if self._is_first(trainer):
            self._position.training_begins(trainer)
        self._log.begin(trainer.global_step)
        self._keep_frozen()
        self._log_scalars(trainer)
        self._draw(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember how the epoch's data begin."""
        if self._is_first(trainer):
            self._position.epoch_begins(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Keep the loss for the diagnostic of a training that diverges."""
        if self.learner is not None and self._drives:
            self.learner.last_loss = loss.detach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log every n optimizer steps, at the first one, and when the structure freezes."""
        if trainer.global_step == self._log.last_step:  # a micro-batch of an accumulated step
            return
        before, self._was_frozen = self._was_frozen, self._frozen()
        froze = self._was_frozen and not before
        if froze:
            self._keep_frozen()
        scalars_due, pictures_due = self._log.advance(trainer)
        if froze or scalars_due:
            values, number = self._log_scalars(trainer), self._number(trainer)
            for name, short in (("relative_flops", "rel_flops"), ("sigma", "sigma")):
                value = values.get(f"gblr{number}/{name}", math.inf)
                pl_module.log(f"gblr{number}/{name}", value, logger=False, batch_size=1)
                pl_module.log(f"{short}{number}", value, logger=False, prog_bar=True, batch_size=1)
        if froze or pictures_due:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw every n epochs."""
        every = self._settings.picture_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log and draw where training ended; say so if that was before the cool-down."""
        learner = self.learner if self._drives else None
        if learner is not None and not learner.frozen:
            if self._settings.freeze_at_end:
                learner.freeze()
                self._keep_frozen()
            elif learner.schedule is not None:
                _logger.warning(
                    "training ended at step %d, before the cool-down at step %d: the structure is not frozen and the "
                    "budget not met; resume, or call callback.learner.freeze()",
                    learner.step_count,
                    learner.schedule.cooldown_begin_step,
                )
        self._log_scalars(trainer)
        self._draw(trainer)

    @torch.no_grad()
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Put a frozen structure back, which callbacks that average weights have averaged too."""
        for layer, (widths, locations) in zip(self._gblr_layers().values(), self._frozen_at, strict=False):
            layer.widths.copy_(widths)
            layer.locations.copy_(locations)
        self._frozen_at = []

    def _keep_frozen(self) -> None:
        if not self.monitor_only and self._frozen():
            self._frozen_at = [
                (layer.widths.detach().clone(), layer.locations.detach().clone())
                for layer in self._gblr_layers().values()
            ]

    def _number(self, trainer: Any) -> str:
        """What tells the totals of a second callback from those of the first: "", "_2", ..."""
        siblings = self._siblings(trainer)
        index = next(index for index, callback in enumerate(siblings, start=1) if callback is self)
        return f"_{index}" if index > 1 else ""

    def _frozen(self) -> bool:
        if self.learner is not None:
            return self.learner.frozen
        return all(layer.structure_frozen for layer in self._layers.values())

    def _log_scalars(self, trainer: Any) -> dict[str, float]:
        return self._log.log(trainer, self._layers, self.learner, f"gblr{self._number(trainer)}/")

    def _draw(self, trainer: Any) -> None:
        """Pictures of the layers of all callbacks, once a step."""
        siblings, step = self._siblings(trainer), trainer.global_step
        drawn = siblings[0]._log
        if not self._settings.draws or step == drawn.last_pictured or not trainer.is_global_zero:
            return
        drawn.last_pictured = step
        learners = [callback.learner for callback in siblings if callback.learner is not None]
        log_pictures(
            trainer.loggers,
            {name: layer for callback in siblings for name, layer in callback._layers.items()},
            step,
            max_size=self._settings.picture_size,
            budget={name: callback._budget for callback in siblings for name in callback._layers},
            lambdas={name: value for learner in learners for name, value in learner.lambdas().items()},
        )

    # -- taking down -------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the optimizers as they were."""
        self._leave()

    def _leave(self) -> None:
        self._release_checkpoint_hook()
        if self.learner is not None and self._drives:
            self.learner.detach()
        if self._pace is not None:
            self._pace.release()

    def _release_checkpoint_hook(self) -> None:
        if self._checkpoint_hook is not None:
            self._checkpoint_hook.remove()
            self._checkpoint_hook = None

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """What checkpoints keep the state under: two callbacks in one Trainer choose their layers by other patterns."""
        if self._include is None and not self._exclude:
            return type(self).__qualname__
        return state_key(self, layers=self._include, exclude=self._exclude)

    def state_dict(self) -> dict[str, Any]:
        """The learner's state, the number of steps that fractions refer to, and the history."""
        if self._restored is not None:
            return self._restored
        return {
            "total_steps": self._total_steps,
            "learner": self.learner.state_dict() if self.learner is not None and self._drives else None,
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until fitting starts: the learner needs the optimizers."""
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add random numbers, the position in the data, and the structure of families' layers."""
        if self._is_first(trainer):
            checkpoint[_POSITION] = self._position.state(trainer)
        families = {name: layer for name, layer in self._layers.items() if isinstance(layer, FamilyLayer)}
        if families:
            records = {name: family_record(layer.geometry) for name, layer in families.items()}
            checkpoint[_FAMILIES] = checkpoint.get(_FAMILIES, {}) | records

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Kept until fitting starts."""
        self._position.restore(checkpoint.get(_POSITION, []))
        name = type(self).__qualname__
        saved = [state for key, state in checkpoint["callbacks"].items() if str(key).startswith(name)]
        if len(saved) == len(self._siblings(trainer)) == 1:  # keyed by other patterns, or older
            self.load_state_dict(copy.deepcopy(saved[0]))


def _same(a: Mapping[str, StructuredLayer], b: Mapping[str, StructuredLayer]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
