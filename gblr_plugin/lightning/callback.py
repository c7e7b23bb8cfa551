"""A Lightning callback that learns block structures, logs them and draws them; no NNI evaluator is needed."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..learning.goals import LayerGoal
from ..learning.learner import StructureLearner
from ..learning.non_finite import NON_FINITE
from ..learning.optimizers import split_structure_group
from ..learning.schedule import Schedule
from ..monitoring.statistics import layer_statistics, total_statistics
from ..surgery.conversion import prepare_layers
from ..surgery.patterns import as_patterns, check_used, matches, value_of
from ..surgery.selection import Pattern, log_skipped, select_layers
from ..surgery.starts import INITIALISERS, UNBUDGETED, LayerSettings
from .base import Callback
from .checkpoint import match_checkpoint
from .reporter import log_pictures, log_scalars, scalars
from .resuming import Place

__all__ = ["GBLRCallback"]

_logger = logging.getLogger(__name__)

_PLACE = "gblr_place"  # its key in a checkpoint
_POOLED = "gblr"  # name of the one group when the budget is pooled
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


class GBLRCallback(Callback):
    """Learns the structure of a model's layers while a Trainer trains it.

    Attached to a Trainer it is enough: when fitting begins it swaps the chosen dense layers for structured ones (before
    optimizers are made), gives widths and locations an optimizer group of their own, and after each real optimizer step
    shrinks the widths towards the budget. From the cool-down on the structure is frozen as exact boxcars, so that what
    is trained then is what is counted, converted and deployed. Works with ``pytorch_lightning`` and
    ``lightning.pytorch``.

    With neither ``budget`` nor ``threshold`` it only watches structured layers that are already there and that
    something else drives (the NNI pruner): it logs and draws, and changes nothing. Tell it the driving learner with
    :meth:`watch`, and it logs lambda too.

    Args:
        budget: Relative FLOPs of the structured layers to end at, in (0, 1]; lambda is found automatically.
        threshold: Alternatively a fixed lambda, as published.
        layers: Full names (of the LightningModule's submodules), glob patterns over names, or types and their names.
            Default: every layer that can be structured and made cheaper; tied weights and output heads stay dense, as
            :func:`~gblr_plugin.surgery.selection.select_layers` says, and what stays dense is logged. If the model has
            structured layers already (from :func:`gblr_plugin.prepare`), those are driven as they are; frozen ones go
            on from their structure.
        exclude: The same kinds of patterns, taken away again.
        group: Whether the layers share one budget, so that the structure decides who spends it; else each has its own.
        warmup: Optimizer steps before anything shrinks; a float in [0, 1] is a fraction of the total number of steps.
        cooldown: Optimizer step, or fraction of the total, at which the budget is met and the structure is frozen.
        initialiser: ``"svd"`` (full widths, as published), ``"random"``, or a decomposition (``"trapezoid"``, ...),
            which starts at ``initial_budget``.
        initial_budget: Relative FLOPs that the initialiser starts at; default: full widths for ``"svd"`` and
            ``"random"``, ``budget`` for others.
        num_components: K per split; default min(m / s, n).
        row_splits: Matrices packed along the rows (packed query, key, value: 3), for all layers or by pattern.
        align: Tile of rows and columns to which intervals snap; an integer or a pair.
        structure_lr: Learning rate of widths and locations; default that of the group they come from.
        seed: Of random initialisers.
        log_every_n_steps: Optimizer steps between scalars; default the Trainer's.
        picture_every_n_epochs: Epochs between pictures; there is also one at the start, at the freeze and at the end. 0
            draws none at all.
        picture_every_n_steps: Also a picture each so many optimizer steps (for training in few, long epochs).
        picture_size: Longest side of a picture, in pixels.
        compact: At the freeze, also drop dead components from the parameters and the optimizers' state, which makes
            the cool-down cheaper. Leave it off where something else holds tensors of the parameters' shapes (moving
            averages of the weights). Not done while several processes train.
        freeze_at_end: Whether training that ends before the cool-down began (early stopping) freezes the structure
            within the budget all the same. By default it stays trainable, for a later fit to go on from.
        non_finite: ``"stop"`` with an error that names the layer where gradients are NaN or infinite, or ``"skip"``
            that optimizer step; see :class:`~gblr_plugin.StructureLearner`. Details are saved in the Trainer's
            ``default_root_dir``.
        replay: Whether going on within an epoch fetches the batches that it has had, and drops them, so that the data
            go on where they stopped. Loaders with a ``state_dict`` need it not, and are left alone.

    Attributes:
        learner: The :class:`~gblr_plugin.StructureLearner` at work, or watched; ``None`` before fitting.
        history: ``{"relative_flops": [(step, value), ...], "sigma": ..., ...}`` of all layers together, as logged;
            steps are the learner's, where it is known.

    Logs ``gblr/relative_flops``, ``gblr/live_components``, ``gblr/mean_row_width``, ``gblr/mean_column_width``
    (fractions of the axis, over live components), ``gblr/sigma``, ``gblr/lambda`` (mean over layers), ``gblr/frozen``,
    and the same per layer as ``gblr_layers/<layer>/...``. The progress bar shows them as ``rel_flops`` and ``sigma``
    (infinite: exact boxcar); ``trainer.callback_metrics`` holds ``gblr/relative_flops`` and ``gblr/sigma`` for other
    callbacks to monitor. Of several callbacks in one Trainer, each with its own ``layers`` (or ``exclude``) and budget,
    the second's totals are ``gblr_2/...``.

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
        warmup: int | float = 0.05,
        cooldown: int | float = 0.8,
        initialiser: str = "svd",
        initial_budget: float | None = None,
        num_components: int | None = None,
        row_splits: int | Mapping[str, int] = 1,
        align: int | tuple[int, int] = 1,
        structure_lr: float | None = None,
        seed: int = 0,
        log_every_n_steps: int | None = None,
        picture_every_n_epochs: int = 10,
        picture_every_n_steps: int | None = None,
        picture_size: int = 512,
        compact: bool = False,
        freeze_at_end: bool = False,
        non_finite: str = "stop",
        replay: bool = True,
    ) -> None:
        self.monitor_only = budget is None and threshold is None
        if not self.monitor_only:
            LayerGoal(budget, threshold)  # checks both
        self._budget, self._threshold = budget, threshold
        self._include = None if layers is None else as_patterns("callback: layers", layers)
        self._exclude = as_patterns("callback: exclude", exclude)
        self._group = group
        self._warmup, self._cooldown = _point("warmup", warmup), _point("cooldown", cooldown)
        if type(warmup) is type(cooldown) and warmup >= cooldown:
            raise ConfigError(f"callback: warmup must be less than cooldown, got {warmup} and {cooldown}")
        if initialiser not in INITIALISERS:
            raise ConfigError(f"callback: initialiser must be one of {', '.join(INITIALISERS)}, got {initialiser!r}")
        if initial_budget is None and initialiser not in UNBUDGETED:
            if budget is None and not self.monitor_only:
                raise ConfigError(f"callback: initialiser {initialiser!r} needs an initial_budget")
            initial_budget = budget
        self._settings: dict[str, Any] = {
            "initialiser": initialiser,
            "num_components": num_components,
            "align": align,
            "budget": initial_budget,
            "seed": seed,
        }
        self._row_splits = row_splits
        if structure_lr is not None and not 0 < structure_lr < math.inf:
            raise ConfigError(f"callback: structure_lr must be positive, got {structure_lr}")
        self._structure_lr = structure_lr
        for name, value in (
            ("log_every_n_steps", log_every_n_steps),
            ("picture_every_n_steps", picture_every_n_steps),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"callback: {name} must be at least 1, got {value}")
        if picture_every_n_epochs < 0 or picture_size < 16:
            raise ConfigError(
                "callback: picture_every_n_epochs must be at least 0 and picture_size at least 16, got "
                f"{picture_every_n_epochs} and {picture_size}"
            )
        self._log_every_n_steps = log_every_n_steps
        self._picture_every_n_epochs = picture_every_n_epochs
        self._picture_every_n_steps = picture_every_n_steps
        self._picture_size = picture_size
        self._compact = compact
        self._freeze_at_end = freeze_at_end
        if non_finite not in NON_FINITE:
            raise ConfigError(f"callback: non_finite must be 'stop' or 'skip', got {non_finite!r}")
        self._non_finite = non_finite

        self.learner: StructureLearner | None = None
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._layers: dict[str, GBLRLayer] = {}
        self._total_steps: int | None = None
        self._restored: dict[str, Any] | None = None
        self._checkpoint_hook: Any = None
        self._place = Place(replay)
        self._frozen_at: list[tuple[Tensor, Tensor]] = []
        self._last_step = 0
        self._last_logged = -1
        self._last_pictured = -1
        self._was_frozen = False
        self._shown = False

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
        """Swap layers, before the model moves to its device and before optimizers are made."""
        if stage == "fit" and not self.monitor_only:
            strategy = type(trainer.strategy).__name__
            if strategy in _SHARDED:
                raise ConfigError(f"callback: {strategy} shards parameters, which structure learning cannot follow")
            averaging = [kind for other in trainer.callbacks if (kind := _averaging(other))]
            if self._compact and averaging:
                raise ConfigError(
                    f"callback: {averaging[0]} holds parameters of the shapes before compaction; leave compact off"
                )
            pl_module.configure_model()  # a model that is built there; Lightning asks that a second call does nothing
            self._layers = self._existing(pl_module)
            if self.learner is None or not _same(self.learner.layers, self._layers):
                for layer in self._layers.values():  # before optimizers look which parameters train
                    if layer.structure_frozen:
                        layer.unfreeze_structure()
            if not self._layers and strategy == "ModelParallelStrategy":
                raise ConfigError(
                    "callback: under ModelParallelStrategy call gblr_plugin.prepare, then fully_shard, in "
                    "configure_model"
                )
            if not self._layers:
                before = [_averaging(other) for other in trainer.callbacks[: trainer.callbacks.index(self)]]
                if any(before):
                    raise ConfigError(
                        f"callback: {next(filter(None, before))} copies the model before it is structured; put "
                        "GBLRCallback before it"
                    )
                self._layers = self._prepare(pl_module)
        if self._checkpoint_hook is None:
            together = self._together(trainer)

            def align(name: str, module: nn.Module) -> int | tuple[int, int]:
                chooser = next((one for one in together if one._chooses(name, module)), self)
                found: int | tuple[int, int] = chooser._settings["align"]
                return found

            self._checkpoint_hook = pl_module.register_load_state_dict_pre_hook(
                lambda module, state, *_: match_checkpoint(module, state, align)
            )

    def _together(self, trainer: Any) -> list[GBLRCallback]:
        """The Trainer's callbacks of this kind, each with layers of its own; the first does what is done once."""
        return [one for one in trainer.callbacks if isinstance(one, GBLRCallback)] or [self]

    def _chooses(self, name: str, module: nn.Module) -> bool:
        included = self._include is None or any(matches(pattern, name, module) for pattern in self._include)
        return included and not any(matches(pattern, name, module) for pattern in self._exclude)

    def _existing(self, pl_module: nn.Module) -> dict[str, GBLRLayer]:
        found = {
            name: module
            for name, module in pl_module.named_modules()
            if isinstance(module, GBLRLayer) and self._chooses(name, module)
        }
        for name, layer in found.items():
            if not self.monitor_only and hasattr(layer, "_nni_wrapper"):
                raise ConfigError(
                    f"layer {name!r}: an NNI pruner drives it already; give the callback neither budget nor threshold "
                    "and it only watches"
                )
        return found

    def _prepare(self, pl_module: nn.Module) -> dict[str, GBLRLayer]:
        selection = select_layers(pl_module, self._include, self._exclude)
        log_skipped(selection.skipped)
        if isinstance(self._row_splits, Mapping):
            check_used("row_splits", self._row_splits, selection.layers, "chosen layer")
        splits = {name: value_of(self._row_splits, name, module, 1) for name, module in selection.layers.items()}
        return prepare_layers(
            pl_module, {name: LayerSettings(**self._settings, row_splits=count) for name, count in splits.items()}
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers exist now, and a checkpoint's weights are loaded, but not yet its optimizer state."""
        self._release_checkpoint_hook()
        if self._together(trainer)[0] is self:
            self._place.fit_begins(trainer)
        restored, self._restored = self._restored, None
        if restored is not None:
            self.history = {
                name: [(step, value) for step, value in curve] for name, curve in restored["history"].items()
            }
        if self.monitor_only:
            self._layers = self._existing(pl_module)
            if not self._layers:
                raise ConfigError(
                    "callback: the model has no structured layers to watch; give a budget or threshold to structure it"
                )
            self._was_frozen = self._frozen()
            return
        # Layers may have been replaced since: a checkpoint that fitted another size, or a model built anew.
        present = self._existing(pl_module)
        missing = [name for name in self._layers if name not in present]
        if missing:
            raise ConfigError(
                f"layer {missing[0]!r}: it was replaced after the callback structured it; build the model in "
                "__init__, or "
                "in a configure_model that does nothing when called again"
            )
        self._layers = present
        if self.learner is None or restored is not None or not _same(self.learner.layers, self._layers):
            self.learner = self._new_learner(trainer, restored)
        structure = [part for layer in self._layers.values() for part in (layer.widths, layer.locations)]
        schedulers = _flat([config.scheduler for config in trainer.lr_scheduler_configs])
        for optimizer in trainer.optimizers:
            split_structure_group(optimizer, structure, lr=self._structure_lr, schedulers=schedulers)
        self.learner.attach_all(list(trainer.optimizers))
        self._was_frozen = self._frozen()

    def _new_learner(self, trainer: Any, restored: Mapping[str, Any] | None) -> StructureLearner:
        if restored is not None:
            self._total_steps = restored["total_steps"]
        elif isinstance(self._warmup, float) or isinstance(self._cooldown, float):
            total = trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise ConfigError(
                    "callback: the Trainer's number of steps is unknown (set max_epochs or max_steps), so give warmup "
                    "and "
                    "cooldown as integers"
                )
            self._total_steps = int(total)
        warmup, cooldown = (self._step(point) for point in (self._warmup, self._cooldown))
        goal = LayerGoal(self._budget, self._threshold, group=_POOLED if self._group else None)
        if isinstance(self._warmup, float) and isinstance(self._cooldown, float):
            cooldown = max(cooldown, warmup + 1)  # fractions of a very short training may round to one step
        goals, schedule = dict.fromkeys(self._layers, goal), Schedule(warmup, cooldown)
        learner = StructureLearner(
            self._layers,
            goals,
            schedule,
            compact=self._compact,
            non_finite=self._non_finite,
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
        if self._together(trainer)[0] is self:
            self._place.training_begins(trainer)
        self._last_logged = self._last_pictured = -1
        self._last_step = trainer.global_step
        self._shown = False
        self._keep_frozen()
        self._log(trainer)
        self._draw(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember how the epoch's data begin."""
        if self._together(trainer)[0] is self:
            self._place.epoch_begins(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Keep the loss for the diagnostic of a training that diverges."""
        if self.learner is not None and not self.monitor_only:
            self.learner.last_loss = loss.detach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log every n optimizer steps, at the first one, and when the structure freezes."""
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        before, self._was_frozen = self._was_frozen, self._frozen()
        froze = self._was_frozen and not before
        if froze:
            self._keep_frozen()
        first, self._shown = not self._shown, True
        due = _due(self._last_step, step, self._log_every_n_steps or trainer.log_every_n_steps)
        draw = froze or _due(self._last_step, step, self._picture_every_n_steps)
        self._last_step = step
        if froze or first or due:
            values = self._log(trainer)
            number = self._number(trainer)
            for name, short in (("relative_flops", "rel_flops"), ("sigma", "sigma")):
                value = values.get(f"gblr{number}/{name}", math.inf)
                pl_module.log(f"gblr{number}/{name}", value, logger=False, batch_size=1)
                pl_module.log(f"{short}{number}", value, logger=False, prog_bar=True, batch_size=1)
        if draw:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw every n epochs."""
        every = self._picture_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log and draw where training ended; say so if that was before the cool-down."""
        learner = None if self.monitor_only else self.learner
        if learner is not None and not learner.frozen:
            schedule = learner.schedule
            if self._freeze_at_end:
                learner.freeze()
                self._keep_frozen()
            elif schedule is not None:
                _logger.warning(
                    "training ended at step %d, before the cool-down at step %d: the structure is not frozen and the "
                    "budget "
                    "not met; resume, or call callback.learner.freeze()",
                    learner.step_count,
                    schedule.cooldown_begin_step,
                )
        self._log(trainer)
        self._draw(trainer)

    @torch.no_grad()
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Put a frozen structure back, which callbacks that average weights have averaged too."""
        for layer, (widths, locations) in zip(self._layers.values(), self._frozen_at, strict=False):
            layer.widths.copy_(widths)
            layer.locations.copy_(locations)
        self._frozen_at = []

    def _keep_frozen(self) -> None:
        if not self.monitor_only and self._frozen():
            self._frozen_at = [
                (layer.widths.detach().clone(), layer.locations.detach().clone()) for layer in self._layers.values()
            ]

    def _number(self, trainer: Any) -> str:
        """What tells the totals of a second callback from those of the first: "", "_2", ..."""
        place = next(index for index, one in enumerate(self._together(trainer), start=1) if one is self)
        return f"_{place}" if place > 1 else ""

    def _frozen(self) -> bool:
        return all(layer.structure_frozen for layer in self._layers.values())

    def _log(self, trainer: Any) -> dict[str, float]:
        parts = layer_statistics(self._layers)
        total = total_statistics(parts)
        sigma = next((layer.sigma for layer in self._layers.values() if layer.sigma is not None), None)
        lambdas = {} if self.learner is None else self.learner.lambdas()
        totals = f"gblr{self._number(trainer)}/"
        values = scalars(parts, total, sigma, self._frozen(), lambdas, totals=totals)
        step = trainer.global_step
        if step != self._last_logged:
            log_scalars(trainer.loggers, values, step)
            own = {name.removeprefix(totals): value for name, value in values.items() if name.startswith(totals)}
            self._remember(step if self.learner is None else self.learner.step_count, own)
        self._last_logged = step
        return values

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            curve = self.history.setdefault(name, [])
            if curve and curve[-1][0] == step:  # a second fit starts where the first ended
                curve.pop()
            curve.append((step, value))

    def _draw(self, trainer: Any) -> None:
        step = trainer.global_step
        pictures = bool(self._picture_every_n_epochs or self._picture_every_n_steps)
        together = self._together(trainer)
        if not pictures or step == together[0]._last_pictured or not trainer.is_global_zero:
            return
        together[0]._last_pictured = step
        log_pictures(
            trainer.loggers,
            {name: layer for one in together for name, layer in one._layers.items()},
            step,
            max_size=self._picture_size,
            budget={name: one._budget for one in together for name in one._layers},
            lambdas={name: value for one in together if one.learner for name, value in one.learner.lambdas().items()},
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
        if self.learner is not None and not self.monitor_only:
            self.learner.detach()

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
        return self._generate_state_key(layers=self._include, exclude=self._exclude)

    def state_dict(self) -> dict[str, Any]:
        """The learner's clock, the number of steps that fractions refer to, and the history."""
        if self._restored is not None:
            return self._restored
        return {
            "total_steps": self._total_steps,
            "learner": None if self.learner is None or self.monitor_only else self.learner.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until fitting starts: the learner needs the optimizers."""
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add random numbers and the place in the data."""
        if self._together(trainer)[0] is self:
            checkpoint[_PLACE] = self._place.state(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Kept until fitting starts."""
        self._place.restore(checkpoint.get(_PLACE, []))
        own = type(self).__qualname__
        saved = [state for key, state in checkpoint["callbacks"].items() if str(key).startswith(own)]
        if len(saved) == len(self._together(trainer)) == 1:  # keyed by other patterns, or older
            self.load_state_dict(copy.deepcopy(saved[0]))


def _averaging(callback: Any) -> str | None:
    """Its name, where it is one of Lightning's that put an average of the weights in their place."""
    return type(callback).__name__ if _AVERAGING & {kind.__name__ for kind in type(callback).__mro__} else None


def _point(name: str, value: int | float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(f"callback: {name} must be a step (int) or a fraction of all steps (float), got {value!r}")
    if isinstance(value, float) and value > 1:
        raise ConfigError(f"callback: {name} as a fraction must lie in [0, 1], got {value}; give steps as an int")
    return value


def _same(a: Mapping[str, GBLRLayer], b: Mapping[str, GBLRLayer]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _due(before: int, now: int, every: int | None) -> bool:
    """Whether a multiple of ``every`` was reached; several optimizers may take several steps a batch."""
    return bool(every) and before // (every or 1) != now // (every or 1)


def _flat(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers, and those inside SequentialLR and ChainedScheduler."""
    flat = []
    for scheduler in schedulers:
        flat.append(scheduler)
        flat.extend(_flat(getattr(scheduler, "_schedulers", ())))
    return flat
