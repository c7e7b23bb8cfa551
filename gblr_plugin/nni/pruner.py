"""``GBLRPruner``: a scheduled pruner of NNI that learns generalized block low-rank weights.

The chosen layers are prepared for structured ones before NNI sees the model; NNI gets a weight target that owns no
tensor, and its evaluator the names of the new parameters (:mod:`.optimizers`). The structure is learned by the
:class:`~gblr_plugin.StructureLearner`; NNI decides when it runs.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.scheduled_pruner import ScheduledPruner
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..calibration.batches import Calibration, CalibrationSettings
from ..errors import ConfigError
from ..layers import GBLRLayer
from ..layers.dense import replace_modules
from ..learning.learner import StructureLearner
from ..learning.schedule import Schedule
from ..surgery.conversion import prepare_layers
from ._compat import is_wrapped, present_goal, wrapper_of
from .calibration import allocated_budgets, calibration_data
from .evaluators import record_optimizers
from .keys import nni_schema
from .optimizers import adopt, check_recorded, is_adopted
from .settings import ModelConfig, read_config
from .wrapper import GBLRWrapper

__all__ = ["GBLRPruner"]

_logger = logging.getLogger(__name__)


class GBLRPruner(ScheduledPruner):
    """Learns the structure of generalized block low-rank weights while the network trains.

    NNI's ``config_list`` chooses layers; ``sparse_ratio`` r is a budget of 1 - r relative FLOPs (lambda is found),
    ``sparse_threshold`` a fixed lambda, ``global_group_id`` pools a budget, ``min_sparse_ratio`` and
    ``max_sparse_ratio`` bound layers within their group, ``granularity: [a, b]`` snaps intervals to multiples of a rows
    and b columns. Own keys stand in a nested ``gblr:`` table or with the prefix ``gblr_``: num_components, initialiser,
    row_splits, seed, start_budget, allocation, structure_lr, pace, sigma_start, sigma_end, compact.

    Alone it follows its own warm-up and cool-down. Inside ``AGPPruner`` or ``LinearPruner`` these drive lambda and
    sigma, and the structure is frozen when they reach their goal; this class gets the evaluator, and the model is
    unwrapped through the outer pruner. While training neither a dense weight nor a dense mask is held (the caller's own
    optimizer keeps the dense weights alive until it is dropped). A teacher for distillation is to be copied from the
    model *before* it is given to this class.

    Args:
        model: Changed in place: chosen layers are replaced (paper Sec. 3). Layers too small to gain stay dense.
        config_list: NNI's config list, see above.
        evaluator: TorchEvaluator or LightningEvaluator; its optimizers hold the weights of the chosen layers. Without
            one ``learner`` can be attached to an optimizer in Python.
        warmup_step: Optimizer steps before anything shrinks.
        cooldown_begin_step: Step from which the structure is frozen as exact boxcars. ``None``: only under AGPPruner or
            LinearPruner.
        calibration: ``CalibrationSettings``, a table of their fields, or ``True``: starts at a budget are fitted to the
            layers' outputs over training batches of the evaluator.
        existed_wrappers: Used by :meth:`from_compressor`.

    Attributes:
        learner: The :class:`~gblr_plugin.StructureLearner` of the structured layers.

    Raises:
        ConfigError: In one line, with the model as it was, for anything in the config, the model or the evaluator that
            cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        warmup_step: int = 0,
        cooldown_begin_step: int | None = None,
        existed_wrappers: Mapping[str, ModuleWrapper] | None = None,
        calibration: CalibrationSettings | Mapping[str, Any] | bool | None = None,
    ) -> None:
        calibrated = CalibrationSettings.read(calibration)
        config = read_config(model, config_list)
        schedule = _schedule(warmup_step, cooldown_begin_step, config)
        wrappers = dict(existed_wrappers or {})
        _check_layers(config, wrappers)
        if evaluator is not None:
            record_optimizers(evaluator, model)
            check_recorded(evaluator, config.layers)
        data = None if calibrated is None else calibration_data(evaluator, model, calibrated)
        self.learner = _prepare(model, config, schedule, data)
        layers = self.learner.layers
        self.warmup_step, self.cooldown_begin_step = warmup_step, cooldown_begin_step
        self._interval_steps = 1
        self._total_times = 0 if cooldown_begin_step is None else cooldown_begin_step - warmup_step
        self._driven = False
        self._training = False
        self._built: list[weakref.ref[Optimizer]] = []
        if evaluator is not None:
            adopt(evaluator, layers, config.structure_lr, self._optimizer_built)
        for name, layer in layers.items():
            old = wrappers.get(name)
            wrapper = GBLRWrapper(layer, name) if old is None else GBLRWrapper.rebind(old, layer)
            wrapper.owner = self
            wrappers[name] = wrapper
        super().__init__(model, [config.layers[name].entry for name in layers], evaluator, wrappers)
        self._init_sparse_goals()

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: Sequence[Mapping[str, Any]],
        warmup_step: int = 0,
        cooldown_begin_step: int | None = None,
        evaluator: Evaluator | None = None,
        calibration: CalibrationSettings | Mapping[str, Any] | bool | None = None,
    ) -> GBLRPruner:
        """Fuse with a compressor that was made first (a distiller, an activation quantizer, a pruner of other layers).

        Args:
            compressor: Its model, wrappers and evaluator are taken over.
            new_config_list: As ``config_list`` of the class.
            warmup_step: See the class.
            cooldown_begin_step: See the class.
            evaluator: Used if the compressor has none.
            calibration: See the class.

        Returns:
            The pruner; its ``compress`` runs both.

        Raises:
            ConfigError: See the class; the first compressor is then as it was.
        """
        was_wrapped = is_wrapped(compressor)
        try:
            pruner: GBLRPruner = super().from_compressor(
                compressor,
                new_config_list,
                evaluator=evaluator,
                warmup_step=warmup_step,
                cooldown_begin_step=cooldown_begin_step,
                calibration=calibration,
            )
        except ConfigError:
            if was_wrapped and not is_wrapped(compressor):
                compressor.wrap_model()
            raise
        return pruner

    def _validate_config(self) -> None:
        for entry in self.config_list:
            nni_schema().validate(entry)

    def _register_scalers(self) -> None:
        """``granularity`` snaps intervals; there is no mask to scale."""

    # -- NNI's schedules ---------------------------------------------------------------------------------------------

    @property
    def interval_steps(self) -> int:
        """Steps between two goals. AGPPruner and LinearPruner set it where they drive this pruner."""
        return self._interval_steps

    @interval_steps.setter
    def interval_steps(self, value: int) -> None:
        self._interval_steps, self._driven = value, True

    @property
    def total_times(self) -> int:
        """Number of goals between the first and the last step of the ramp."""
        return self._total_times

    @total_times.setter
    def total_times(self, value: int) -> None:
        self._total_times, self._driven = value, True

    def update_sparse_goals(self, current_times: int) -> None:
        """Show NNI the present goals under the own schedule.

        Args:
            current_times: Steps since the end of the warm-up.
        """
        share = min(1.0, max(0.0, current_times / self._total_times))
        self._update_sparse_goals_by_ratio(Schedule.ramp(share))

    def _covered(self) -> float:
        """Share of the ramp that a driving pruner has covered: present goal over final goal."""
        ratios: list[float] = [
            present_goal(self, name, target, key) / goal
            for name, targets in self.sparse_goals.items()
            for target, goals in targets.items()
            for key, goal in goals.items()
            if key in ("sparse_ratio", "sparse_threshold") and goal > 0
        ]
        return min(ratios)

    # -- training ----------------------------------------------------------------------------------------------------

    def _optimizer_built(self, optimizer: Optimizer) -> None:
        if self._training:  # Lightning builds optimizers when training begins
            self._attach([optimizer])
        else:
            self._built.append(weakref.ref(optimizer))

    def _attach(self, optimizers: Sequence[Optimizer]) -> None:
        self.learner.begin()
        held = {id(layer.widths) for layer in self.learner.layers.values()}
        for optimizer in optimizers:
            if any(id(parameter) in held for group in optimizer.param_groups for parameter in group["params"]):
                self.learner.attach(optimizer)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        """Start learning; NNI calls it before each training, whether other compressors take part or not."""
        if not is_adopted(evaluator):
            raise ConfigError(
                "evaluator: give it to GBLRPruner itself, not only to the pruner around it; its optimizers do not "
                "know the structured layers"
            )
        self.learner.detach()  # left over if a training was interrupted
        if self._driven:
            self._check_driver()
            self.learner.schedule = None
        elif self.learner.schedule is None:
            raise ConfigError("cooldown_begin_step is missing: give it, or use AGPPruner or LinearPruner around this")
        self._training = True
        built, self._built = self._built, []
        self._attach([optimizer for optimizer in (reference() for reference in built) if optimizer is not None])
        after = self._follow_goals if self._driven else self._show_goals
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[after])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        """Stop learning after a training."""
        self._stop()
        if not self.learner.frozen:
            _logger.warning(
                "the structure is not final: training ended after %d steps, before %s; go on with compress(), or call "
                "learner.freeze()",
                self.learner.step_count,
                "the pruner around it reached its goal" if self._driven else f"step {self.cooldown_begin_step}",
            )

    def _stop(self) -> None:
        self._training = False
        self._built = []
        self.learner.detach()

    def _check_driver(self) -> None:
        last = self._interval_steps * self._total_times
        if self.cooldown_begin_step is not None and last > self.cooldown_begin_step:
            raise ConfigError(
                f"the pruner around gblr ends at step {last} (interval_steps x total_times), after cooldown_begin_step "
                f"{self.cooldown_begin_step}; the structure must be frozen by then"
            )
        if not any(plan_goal.budget != 1.0 or plan_goal.threshold for plan_goal in self.learner.goals.values()):
            raise ConfigError("nothing to drive: all sparse_ratio and sparse_threshold are 0")

    def _follow_goals(self) -> None:
        covered = self._covered()
        self.learner.set_progress(covered)
        if covered >= 1.0:
            self.learner.freeze()

    def _show_goals(self) -> None:
        self.update_sparse_goals(self.learner.step_count - self.warmup_step)

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def compress(self, max_steps: int | None, max_epochs: int | None) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Train with the evaluator and learn the structure.

        A second call goes on where the first ended: with a frozen structure it fine-tunes.

        Args:
            max_steps: Optimizer steps; at least ``cooldown_begin_step``.
            max_epochs: Or epochs.

        Returns:
            The model, and the support of each structured layer as ``{layer: {"weight": mask}}``, with 0/1 masks of the
            dense weight's shape.

        Raises:
            ConfigError: Without evaluator, duration or schedule, or with too few steps.
        """
        if self.evaluator is None:
            raise ConfigError("compress: GBLRPruner was made without an evaluator, so there is nothing to train with")
        if max_steps is None and max_epochs is None:
            raise ConfigError("compress: give max_steps or max_epochs")
        left = (self.cooldown_begin_step or 0) - self.learner.step_count
        if max_steps is not None and max_steps < left and not self.learner.frozen:
            raise ConfigError(
                f"compress: max_steps {max_steps} ends before the structure is final, {left} steps from now "
                f"(cooldown_begin_step {self.cooldown_begin_step})"
            )
        try:
            result: tuple[nn.Module, dict[str, dict[str, Tensor]]] = super().compress(max_steps, max_epochs)
        finally:
            self._stop()
        return result


def _schedule(warmup_step: int, cooldown_begin_step: int | None, config: ModelConfig) -> Schedule | None:
    if cooldown_begin_step is None:
        Schedule(warmup_step, warmup_step + 1, config.sigma_start, config.sigma_end)  # checks the sigmas
        return None
    return Schedule(warmup_step, cooldown_begin_step, config.sigma_start, config.sigma_end)


def _check_layers(config: ModelConfig, wrappers: Mapping[str, ModuleWrapper]) -> None:
    for name, layer in config.layers.items():
        if wrapper_of(layer.module) is not None:
            raise ConfigError(
                f"layer {name!r} is wrapped by another compressor; use GBLRPruner.from_compressor(that_compressor, "
                "...) or unwrap the model first"
            )
        if name in wrappers:
            GBLRWrapper.check_rebindable(wrappers[name])
        weight: Any = layer.module.U if isinstance(layer.module, GBLRLayer) else getattr(layer.module, "weight", None)
        if weight is not None and not weight.requires_grad:
            raise ConfigError(f"layer {name!r}: its weight does not require gradients; nothing can be learned there")


def _prepare(
    model: nn.Module, config: ModelConfig, schedule: Schedule | None, calibration: Calibration | None
) -> StructureLearner:
    """Structure the dense layers of a config; on any error the model is as it was."""
    ready = {name: layer.module for name, layer in config.layers.items() if isinstance(layer.module, GBLRLayer)}
    dense = {name: layer.settings for name, layer in config.layers.items() if name not in ready}
    shares = allocated_budgets(
        model,
        {name: config.layers[name] for name in dense},
        {name: settings.budget for name, settings in dense.items()},
        calibration,
    )
    dense |= {name: replace(dense[name], budget=share) for name, share in shares.items()}
    prepared = prepare_layers(model, dense, calibration=calibration) if dense else {}
    layers = {name: {**ready, **prepared}[name] for name in config.layers if name in ready or name in prepared}
    goals = {name: config.layers[name].goal for name in layers}
    try:
        sigmas = config.sigma_start, config.sigma_end
        learner = StructureLearner(layers, goals, schedule, sigmas=sigmas, pace=config.pace, compact=config.compact)
    except ConfigError:
        replace_modules(model, {id(layer): config.layers[name].module for name, layer in prepared.items()})
        raise
    for layer in ready.values():
        layer.unfreeze_structure()
    return learner
