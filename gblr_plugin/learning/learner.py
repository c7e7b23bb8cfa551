"""The object that learns the structure of a model's layers while any training loop trains them.

NNI's pruner, the Lightning callback and loops written by hand all use :class:`StructureLearner`. They attach it to the
optimizers; the progress of the training comes from the learner's schedule or from the host.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..layers.distributed_parameters import replicated
from .decomposing import Decomposer
from .goals import CostTargets, LayerGoal
from .non_finite import FiniteGuard
from .optimizers import check_optimized, learning_rates
from .pace import PACE, FactorPace
from .schedule import Schedule
from .shrinking import Shrinker
from .step_hook import StepHook

__all__ = ["StructureLearner"]

_WATCHED = 32  # training steps over which moments are taken before layers are decomposed

_logger = logging.getLogger(__name__)
_DRIVING: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StructureLearner]] = weakref.WeakKeyDictionary()


class StructureLearner:
    """Learns the structure of layers while any training loop trains them.

    After each real step of an optimizer the learner counts the step, takes the proximal step of that optimizer's layers
    (``gblr_plugin.learning.shrinking``), and updates sigma. The proximal step uses a fixed lambda, or the lambda at
    which the layers meet the present target of their descent to the budget. When the progress reaches 1, the learner
    rounds the widths to integers within the budget and freezes the structure as exact boxcars. Groups of layers that
    begin within their budget, as a decomposition makes them, are frozen from the start: learning their intervals
    further gains nothing (docs/results/pattern-or-allocation.md).

    Several optimizers may hold the layers, even those of one group; only the first optimizer's steps are counted. The
    freeze brings all layers to the budget together.

    Args:
        layers: Structured layers by name. Layers that appear twice are counted once.
        goals: A goal for each name.
        schedule: Warm-up, homotopy and cool-down. ``None``: the host gives the progress by :meth:`set_progress`.
        sigmas: Smoothness at the start and just before freezing where the host gives the progress.
        pace: How far factors move in a step of an optimizer, see :class:`~gblr_plugin.learning.pace.FactorPace`. By
            default ``PACE`` times as far where all layers were decomposed, by the learner or before it, else as the
            optimizer says.
        compact: At the freeze, also drop dead components from the parameters and from the state of the attached
            optimizers, which makes the cool-down cheaper. Parameters change shape then: leave it off where something
            else holds tensors of their shape (moving averages of the weights). Never done while several processes
            train.
        non_finite: What to do where gradients are NaN or infinite, before the optimizer has spread them: ``"stop"``
            with an error that names the layer, or ``"skip"`` that optimizer step (at most 100 in a row). Widths,
            locations and factors that are not finite always stop. On CUDA, where looking waits for the device,
            ``"stop"`` looks at every 32nd step, ``"skip"`` at each.
        diagnostics: Folder for a JSON file of every layer's values and gradients when training stops so; ``None``: the
            system's folder of temporary files. The error names the file.

    Raises:
        ConfigError: If names differ, the goals of a group contradict each other, or its bounds exclude its budget.
    """

    def __init__(
        self,
        layers: Mapping[str, GBLRLayer],
        goals: Mapping[str, LayerGoal],
        schedule: Schedule | None,
        sigmas: tuple[float, float] = (1.0, 100.0),
        *,
        pace: float | None = None,
        compact: bool = False,
        non_finite: str = "stop",
        diagnostics: str | os.PathLike[str] | None = None,
    ) -> None:
        if set(layers) != set(goals):
            raise ConfigError(f"structure learner: layers and goals differ in {sorted(set(layers) ^ set(goals))}")
        self.layers = dict(layers)
        self.goals = {name: goals[name] for name in layers}
        self.schedule = schedule
        self.compact = compact
        self.sigmas = sigmas
        self.step_count = 0
        self.progress = 0.0
        self.frozen = False
        self._guard = FiniteGuard(self.layers, non_finite, diagnostics, self._facts)
        self._costs = CostTargets(self.layers, self.goals)
        self._shrinker = Shrinker(self.layers, self.goals, self._costs)
        self._decomposer = Decomposer(self.layers, self.goals, self._costs) if self._begin_dense() else None
        self._given_pace = pace
        self._pace = FactorPace(list(self.layers.values()), pace or 1.0)
        self._hooks: list[StepHook] = []

    def _begin_dense(self) -> bool:
        """Whether the layers hold their dense weights, so that they are trained as such and then decomposed.

        Raises:
            ConfigError: If some of them have a fixed lambda, which shrinks widths.
        """
        dense = [layer.holds_dense_weight for layer in self.layers.values()]
        if not dense or not all(dense) or all(goal.budget == 1.0 for goal in self.goals.values()):
            return False
        fixed = next((name for name, goal in self.goals.items() if goal.budget is None), None)
        if fixed is not None:
            raise ConfigError(f"layer {fixed!r}: initialiser 'dense' needs a budget; a fixed lambda shrinks widths")
        return True

    # -- setting up --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Set the starting smoothness and record the starting costs; a no-op once begun (also after a resume).

        Raises:
            ConfigError: If some layers hold their dense weights and others do not, and exceed their budget together.
        """
        if self._costs.start_costs is not None:
            return
        self._costs.begin()
        within = self._costs.begins_within_budget()
        for (name, layer), fixed in zip(self.layers.items(), within, strict=True):
            if not fixed and self._decomposer is None and layer.holds_dense_weight:
                self._costs.start_costs = None
                raise ConfigError(f"layer {name!r}: initialiser 'dense' must be that of all layers, or of none")
        for layer, fixed in zip(self.layers.values(), within, strict=True):
            if fixed or self._decomposer is not None:
                layer.freeze_structure(keep_gradients=self._replicated())
            else:
                layer.use_trapezoid_form()  # in this form every component can shrink
                layer.set_sigma(self._due_sigma())
        if self._given_pace is None and (all(within) or self._decomposer is not None):
            self._pace.pace = PACE
        if all(within):
            self.frozen, self.progress = True, 1.0
            self._report_unmet()

    def attach(self, optimizer: Optimizer) -> None:
        """Run :meth:`after_step` after each real step of the optimizer that holds the structure parameters.

        Raises:
            ConfigError: If another learner is attached to this optimizer for one of the layers.
        """
        self._check_alone(optimizer)
        _DRIVING.setdefault(optimizer, weakref.WeakSet()).add(self)
        self._hooks.append(
            StepHook(
                optimizer,
                lambda: self.after_step(optimizer),
                self._before_step,
                lambda: self._with_gradients(optimizer),
            )
        )

    def _check_alone(self, optimizer: Optimizer) -> None:
        others = [other for other in _DRIVING.get(optimizer, ()) if other is not self]
        driven = {id(layer) for other in others for layer in other.layers.values()}
        for name, layer in self.layers.items():
            if id(layer) in driven:
                raise ConfigError(
                    f"layer {name!r}: another structure learner drives it with the same optimizer; detach() that one, "
                    "or give each its own layers"
                )

    def attach_all(self, optimizers: list[Optimizer]) -> None:
        """Attach to those of the optimizers that hold structure parameters, and begin.

        Raises:
            ConfigError: If no optimizer holds the widths of a layer, or another learner is attached for that layer.
        """
        if not self.frozen:
            check_optimized(self.layers, optimizers)
        for optimizer in optimizers:
            self._check_alone(optimizer)
        self.detach()
        self.begin()
        for optimizer in optimizers:
            if self.is_held_by(optimizer):
                self.attach(optimizer)
        self._refreeze(has_optimizers=True)

    def is_held_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds what is learned of a layer: its widths, or the weight that is decomposed."""
        layers = self.layers.values()
        learned = [layer.widths if self._decomposer is None else layer.U for layer in layers]
        return any(rate is not None for rate in learning_rates(optimizer, learned))

    def detach(self) -> None:
        """Detach from all optimizers, whose ``step`` is again what it was."""
        for hook in self._hooks:
            hook.remove()
            _DRIVING.get(hook.optimizer, weakref.WeakSet()).discard(self)
        self._hooks.clear()
        self._refreeze(has_optimizers=False)  # no hook removes the gradients of zero any more

    def _refreeze(self, has_optimizers: bool) -> None:
        """Under DistributedDataParallel, freeze the layers anew, with gradients of zero only if a hook removes them."""
        if self._replicated():
            for layer in self._frozen_layers():
                layer.freeze_structure(keep_gradients=has_optimizers)

    def _replicated(self) -> bool:
        return replicated(layer.widths for layer in self.layers.values())

    def _frozen_layers(self) -> list[GBLRLayer]:
        """Layers whose structure no step of an optimizer changes."""
        return [layer for layer in self.layers.values() if layer.structure_frozen]

    def _before_step(self) -> None:
        """Remove the zero gradients of a fixed structure before the optimizer sees them."""
        for layer in self._frozen_layers():
            layer.widths.grad = layer.locations.grad = None

    def _with_gradients(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer may step with the gradients that there are now; see to what it is going to change."""
        usable = self._guard.is_usable(optimizer)
        dense = self._decomposer is not None and not self.frozen
        if self._decomposer is not None and dense:
            self._decomposer.drop_unit_gradients()
        self._pace.before_step(optimizer, active=usable and not dense)
        return usable

    # -- each step ---------------------------------------------------------------------------------------------------

    def after_step(self, optimizer: Optimizer) -> None:
        """Do the work after a real step of an optimizer: count it, shrink its layers, update sigma or freeze.

        If several optimizers are attached, only the steps of the first are counted.
        """
        self._pace.after_step()
        optimizers = [hook.optimizer for hook in self._hooks]
        if not optimizers or optimizers[0] is optimizer:
            self.step_count += 1
            if self.schedule is not None and not self.frozen:
                self.progress = self.schedule.progress(self.step_count)
        if self.frozen:
            return
        if self._decomposer is not None:
            if not optimizers or optimizers[0] is optimizer:
                self._watch_or_decompose()
            return
        self._shrink(optimizer, optimizers)
        if self.schedule is not None:
            if self.progress >= 1.0:
                self.freeze()
            else:
                self._set_sigma()

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer, optimizers: list[Optimizer]) -> None:
        widths = self._shrinker.widths()
        self._guard.check_structure(widths)
        scheduled = self.schedule is not None
        self._shrinker.step(
            widths,
            optimizer,
            optimizers,
            covered=Schedule.ramp(self.progress) if scheduled else self.progress,
            fixed=1.0 if scheduled else self.progress,  # with a host's progress, fixed lambdas grow with it too
            in_warmup=scheduled and self.progress <= 0.0,
        )

    def _watch_or_decompose(self) -> None:
        """Decompose dense weights if that is due; take moments in the steps before, or always if a host decides."""
        assert self._decomposer is not None
        if self.schedule is None:
            self._decomposer.watch(restart_after=_WATCHED)
        elif self.progress >= 1.0:
            self.freeze()
        elif self.step_count + _WATCHED >= self.schedule.cooldown_begin_step:
            self._decomposer.watch()

    def set_progress(self, progress: float) -> None:
        """Set the share of the descent to the budget that is due, in [0, 1]; for hosts with their own schedules."""
        if self.frozen:
            return
        self.progress = min(1.0, max(0.0, progress))
        self._set_sigma()

    def _due_sigma(self) -> float:
        return (self.schedule or Schedule(0, 1, *self.sigmas)).sigma(self.progress)

    def _set_sigma(self) -> None:
        for layer in self.layers.values():
            if not layer.structure_frozen:
                layer.set_sigma(self._due_sigma())

    @torch.no_grad()
    def freeze(self) -> None:
        """Meet the budget exactly, round the widths, and fix the structure as exact boxcars."""
        if self.frozen:
            return
        self._guard.check_parameters()
        self.begin()
        if self.frozen:
            return
        self.progress = 1.0
        has_optimizers = self._replicated() and bool(self._hooks)
        if self._decomposer is not None:
            self._decomposer.decompose([hook.optimizer for hook in self._hooks])
            self._pace.restart()
            self.frozen = True
            self._report_unmet()
            return
        for layer, widths in zip(self.layers.values(), self._shrinker.final_widths(), strict=True):
            if not layer.structure_frozen:
                layer.freeze_structure(widths, keep_gradients=has_optimizers)
        self.frozen = True
        self._report_unmet()
        if self.compact and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            for layer in self.layers.values():
                layer.compact([hook.optimizer for hook in self._hooks])

    def _report_unmet(self) -> None:
        """Warn about groups that miss their budget: above it, or more than 0.01 below, with too few live components."""
        sizes = [float(math.prod(layer.matrix_shape)) for layer in self.layers.values()]
        dense = self._costs.by_group(sizes)
        # A layer that costs more than its dense matrix is stored as that matrix.
        stored = [min(layer.stored, size) for layer, size in zip(self.layers.values(), sizes, strict=True)]
        cost = self._costs.by_group(stored)
        for group, name in {group: name for name, group in zip(self.layers, self._costs.groups, strict=True)}.items():
            asked = self.goals[name].budget
            if asked is not None and not asked - 0.01 <= cost[group] / dense[group] <= asked:
                _logger.warning(
                    "budget of layer %r and its group: asked for relative FLOPs %.4g, reached %.4g",
                    name,
                    asked,
                    cost[group] / dense[group],
                )

    # -- watching ----------------------------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps that were not taken because gradients were not finite."""
        return self._guard.skipped_steps

    @property
    def last_loss(self) -> Tensor | None:
        """A detached loss for the diagnostic, which hosts may set."""
        return self._guard.last_loss

    @last_loss.setter
    def last_loss(self, loss: Tensor | None) -> None:
        self._guard.last_loss = loss

    def _facts(self) -> dict[str, Any]:
        return {"step": self.step_count, "progress": self.progress, "sigma": self.sigma}

    @property
    def sigma(self) -> float | None:
        """Present smoothness; ``None`` is the exact boxcar."""
        return next((layer.sigma for layer in self.layers.values() if not layer.structure_frozen), None)

    def lambdas(self) -> dict[str, float]:
        """Present lambda per layer: its threshold over its learning rate (paper Algorithm 1); 0 once frozen."""
        if self.frozen or self._decomposer is not None:
            return dict.fromkeys(self.layers, 0.0)
        return dict(zip(self.layers, self._shrinker.lambdas(), strict=True))

    @property
    def relative_flops(self) -> float:
        """Multiply-adds of all layers over those of their dense weights."""
        dense = sum(math.prod(layer.matrix_shape) for layer in self.layers.values())
        return sum(layer.stored for layer in self.layers.values()) / dense if dense else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Steps, starting costs and the round's thresholds; all other state is in the layers and the optimizer."""
        due = self._shrinker.due
        return {
            "step_count": self.step_count,
            "progress": self.progress,
            "frozen": self.frozen,
            "start_costs": self._costs.start_costs,
            "rates": self._shrinker.rates,
            "due": None if due is None else due.tolist(),
            "stepped": self._shrinker.stepped,
            "pace": self._pace.pace,
            "pace_steps": self._pace.steps,
            "decomposer": None if self._decomposer is None else self._decomposer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; the state of the layers must be loaded too, before or after this.

        Raises:
            ConfigError: If the state is not from :meth:`state_dict`, or is for another number of layers.
        """
        missing = [key for key in self.state_dict() if not isinstance(state, Mapping) or key not in state]
        if missing:
            raise ConfigError(f"structure learner: its state lacks {', '.join(missing)}; give what state_dict() gave")
        for values in (state["start_costs"], state["rates"], state["due"]):
            if values is not None and len(values) != len(self.layers):
                raise ConfigError(
                    f"structure learner: the state is of {len(values)} layers, these are {len(self.layers)}"
                )
        self.step_count = int(state["step_count"])
        self.progress = float(state["progress"])
        self.frozen = bool(state["frozen"])
        self._costs.start_costs = state["start_costs"]
        due, device = state["due"], next((layer.widths.device for layer in self.layers.values()), None)
        self._shrinker.rates = [float(rate) for rate in state["rates"]]
        self._shrinker.due = None if due is None else torch.tensor(due, dtype=torch.float64, device=device)
        self._shrinker.stepped = list(state["stepped"])
        self._pace.steps = int(state["pace_steps"])
        if state["decomposer"] is not None:
            if self._decomposer is None:  # the layers were loaded, and are decomposed already
                self._decomposer = Decomposer(self.layers, self.goals, self._costs)
            self._decomposer.load_state_dict(state["decomposer"])
        self._pace.pace = float(state["pace"])
        if state["start_costs"] is None:
            return
        within = self._costs.begins_within_budget()
        for layer, fixed in zip(self.layers.values(), within, strict=True):
            if fixed or self.frozen or self._decomposer is not None:
                layer.freeze_structure()
        self._set_sigma()
