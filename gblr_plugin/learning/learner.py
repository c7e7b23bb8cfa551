"""Drives the structure of a model's layers through training: prox-and-clip, sigma, lambda, and the final freeze.

One object serves every host. NNI's pruner and the Lightning callback only decide when it is attached to which
optimizer, and who turns its clock.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError, GBLRError
from ..layers import GBLRLayer
from ..layers.distributed_parameters import all_finite, own_part, replicated, whole
from .budget import AxisSpec, WidthBudget
from .non_finite import find_cause, gradients_finite, save_diagnostic
from .optimizers import StepHook, check_optimized, learning_rates
from .proximal import prox_and_clip_
from .schedule import Schedule

__all__ = ["NON_FINITE", "LayerGoal", "StructureLearner"]

NON_FINITE = ("stop", "skip")

_logger = logging.getLogger(__name__)
_CUDA_CHECK_EVERY = 32
_MOST_SKIPPED = 100  # in a row: then training stands still
_DRIVING: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StructureLearner]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LayerGoal:
    """What a layer's structure is to become.

    Args:
        budget: Relative FLOPs to end at, in (0, 1]; lambda is found automatically.
        threshold: Alternatively a fixed lambda, as published.
        group: Layers of one group share one budget, weighted by their dense multiply-adds; ``None``: on its own.
        min_flops: Least relative FLOPs of this layer within its group.
        max_flops: Most relative FLOPs of this layer within its group.

    Raises:
        ConfigError: Unless exactly one of ``budget`` and ``threshold`` is given and all are in range.
    """

    budget: float | None = None
    threshold: float | None = None
    group: Hashable = None
    min_flops: float = 0.0
    max_flops: float = math.inf

    def __post_init__(self) -> None:
        for name in ("budget", "threshold", "min_flops", "max_flops"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise ConfigError(f"goal: {name} must be a number, got {value!r}")
        if (self.budget is None) == (self.threshold is None):
            raise ConfigError("goal: give either a budget or a fixed threshold (lambda), not both or none")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ConfigError(f"goal: budget must be relative FLOPs in (0, 1], got {self.budget}")
        if self.threshold is not None and not (0 <= self.threshold < math.inf):
            raise ConfigError(f"goal: threshold (lambda) must be finite and at least 0, got {self.threshold}")
        if not self.min_flops >= 0:
            raise ConfigError(f"goal: min_flops must be relative FLOPs of at least 0, got {self.min_flops}")
        if not self.max_flops >= self.min_flops:
            raise ConfigError(f"goal: min_flops {self.min_flops} exceeds max_flops {self.max_flops}")


class StructureLearner:
    """Learns the structure of layers while any training loop trains them.

    After each real optimizer step it turns its clock, sets lambda (a fixed one, or the one that meets the ramped
    budget), runs one fused prox-and-clip over the layers of that optimizer, and updates sigma. At the end of the ramp
    it settles the widths on whole samples within the budget and freezes the structure as exact boxcars. Groups of
    layers that begin within their budget have hard masks throughout, whose gradients are smoothed by the final sigma.

    Several optimizers may share the layers, also those of one group. Each optimizer takes the proximal step of the
    layers whose widths it holds, and moves no others: by the group's lambda times the layer's own learning rate. One
    lambda holds for a round, until an optimizer steps for the second time: the lambda at which the group meets its
    target if each of its layers takes one step. So all layers pay alike, whichever optimizer is first; what the
    gradients of later optimizers add within a round is taken away in the next. The first optimizer turns the clock, and
    shrinks layers whose weights are frozen and in no optimizer, at its largest rate. The freeze brings all layers to
    the budget together.

    Args:
        layers: Structured layers by name. Layers that appear twice are counted once.
        goals: A goal for each name.
        schedule: Warm-up, homotopy and cool-down. ``None``: the host turns the clock with :meth:`set_progress`.
        sigmas: Smoothness at the start and just before freezing where the host turns the clock.
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

    Attributes:
        skipped_steps: Optimizer steps that were not taken.
        last_loss: A detached loss for the diagnostic, which hosts may set.

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
        compact: bool = False,
        non_finite: str = "stop",
        diagnostics: str | os.PathLike[str] | None = None,
    ) -> None:
        if non_finite not in NON_FINITE:
            raise ConfigError(f"structure learner: non_finite must be 'stop' or 'skip', got {non_finite!r}")
        if set(layers) != set(goals):
            raise ConfigError(f"structure learner: layers and goals differ in {sorted(set(layers) ^ set(goals))}")
        self.layers = dict(layers)
        self.goals = {name: goals[name] for name in layers}
        self.schedule = schedule
        self.compact = compact
        self.non_finite = non_finite
        self.diagnostics = diagnostics
        self.skipped_steps = 0
        self.last_loss: Tensor | None = None
        self._skipped_in_a_row = 0
        self.sigmas = sigmas
        self.step_count = 0
        self.progress = 0.0
        self.frozen = False
        self._group_ids = self._number_groups()
        self._start_costs: list[float] | None = None
        self._hooks: list[StepHook] = []
        self._budget: WidthBudget | None = None
        self._budget_made_for: tuple[torch.device, int, list[bool]] | None = None
        self._last_lambdas: Tensor | None = None
        self._last_rates = [0.0] * len(self.layers)
        self._due: Tensor | None = None  # thresholds of the budgets in this round
        self._stepped: list[int] = []  # places of the optimizers that have taken their step in it
        self._check_bounds()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _number_groups(self) -> list[int]:
        numbers: dict[Hashable, int] = {}
        targets: dict[int, tuple[float | None, float | None]] = {}
        ids = []
        for name, goal in self.goals.items():
            key: Hashable = ("layer", name) if goal.group is None else ("group", goal.group)
            number = numbers.setdefault(key, len(numbers))
            asked = goal.budget, goal.threshold
            if targets.setdefault(number, asked) != asked:
                raise ConfigError(f"layer {name!r}: group {goal.group!r} has two goals, {targets[number]} and {asked}")
            ids.append(number)
        return ids

    def _check_bounds(self) -> None:
        dense, least, most = self._zeros(), self._zeros(), self._zeros()
        for (name, layer), goal, group in zip(self.layers.items(), self.goals.values(), self._group_ids, strict=True):
            size = math.prod(layer.matrix_shape)
            dense[group] += size
            least[group] += goal.min_flops * size
            most[group] += min(goal.max_flops, 2.0) * size
            if goal.budget is not None and layer.widths.device != next(iter(self.layers.values())).widths.device:
                raise ConfigError(f"layer {name!r}: all structured layers must be on one device")
        for (name, goal), group in zip(self.goals.items(), self._group_ids, strict=True):
            if goal.budget is not None and not least[group] <= goal.budget * dense[group] <= most[group]:
                raise ConfigError(
                    f"layer {name!r}: the bounds of its group allow relative FLOPs from "
                    f"{least[group] / dense[group]:.4g} to {most[group] / dense[group]:.4g}, "
                    f"which excludes the budget {goal.budget:g}"
                )

    def _zeros(self) -> list[float]:
        return [0.0] * (max(self._group_ids, default=-1) + 1)

    def begin(self) -> None:
        """Set the starting smoothness and record the starting costs; a no-op once begun (also after a resume)."""
        if self._start_costs is None:
            self._start_costs = [float(layer.stored) for layer in self.layers.values()]
            for layer, sharp in zip(self.layers.values(), self._sharp(), strict=True):
                if not sharp:
                    layer.fix_gauge()  # all of it may have to shrink
            self._set_sigma()

    def attach(self, optimizer: Optimizer) -> None:
        """Run :meth:`after_step` after each real step of the optimizer that holds the structure parameters.

        Raises:
            ConfigError: If another learner is attached to it for one of the layers.
        """
        self._check_alone(optimizer)
        _DRIVING.setdefault(optimizer, weakref.WeakSet()).add(self)
        self._hooks.append(
            StepHook(
                optimizer, lambda: self.after_step(optimizer), self._before_step, lambda: self._is_usable(optimizer)
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
        """Attach to those optimizers that hold structure parameters, and begin.

        Raises:
            ConfigError: If the widths of a layer are in none of them, or another learner drives it with one of them.
        """
        if not self.frozen:
            check_optimized(self.layers, optimizers)
        for optimizer in optimizers:
            self._check_alone(optimizer)
        self.detach()
        self.begin()
        for optimizer in optimizers:
            if any(rate is not None for rate in self._rates(optimizer)):
                self.attach(optimizer)
        if self.frozen and self._replicated():
            self._freeze_layers(attached=True)

    def detach(self) -> None:
        """Leave all optimizers as they were."""
        for hook in self._hooks:
            hook.remove()
            _DRIVING.get(hook.optimizer, weakref.WeakSet()).discard(self)
        self._hooks.clear()
        if self.frozen and self._replicated():
            self._freeze_layers(attached=False)  # nobody takes the gradients of zero away any more

    def _replicated(self) -> bool:
        return replicated(layer.widths for layer in self.layers.values())

    def _freeze_layers(self, attached: bool) -> None:
        for layer in self.layers.values():
            layer.freeze_structure(attached=attached)

    def _before_step(self) -> None:
        """A frozen structure is no business of the optimizer, whatever gradients of zero it has."""
        if self.frozen:
            for layer in self.layers.values():
                layer.widths.grad = layer.locations.grad = None

    # -- each step ---------------------------------------------------------------------------------------------------

    def after_step(self, optimizer: Optimizer) -> None:
        """One real step of an optimizer was taken. With several optimizers the clock follows the first."""
        if not self._hooks or self._hooks[0].optimizer is optimizer:
            self.step_count += 1
            if self.schedule is not None and not self.frozen:
                self.progress = self.schedule.progress(self.step_count)
        if self.frozen:
            return
        self._shrink(optimizer)
        if self.schedule is not None:
            if self.progress >= 1.0:
                self.freeze()
            else:
                self._set_sigma()

    def _rates(self, optimizer: Optimizer) -> list[float | None]:
        """Learning rate of each layer's widths in an optimizer; ``None`` where it does not hold them."""
        return learning_rates(optimizer, [layer.widths for layer in self.layers.values()])

    def _all_rates(self, optimizer: Optimizer) -> tuple[list[float], list[bool]]:
        """Learning rate of each layer's widths, and whether a step of this optimizer moves them."""
        attached = [hook.optimizer for hook in self._hooks] or [optimizer]
        held = [self._rates(each) for each in (optimizer, *attached)]
        rates, moved = [], []
        for (name, layer), own, *others in zip(self.layers.items(), *held, strict=True):
            rate, moves = next((value for value in (own, *others) if value is not None), None), own is not None
            if rate is None and not layer.widths.requires_grad and self.goals[name].budget is not None:
                rate, moves = max(value or 0.0 for value in held[1]), optimizer is attached[0]
            rates.append(rate or 0.0)
            moved.append(moves)
        return rates, moved

    def _begins_round(self, optimizer: Optimizer) -> bool:
        """Whether this step begins a round, since the optimizer has taken one in the present round."""
        place = next((index for index, hook in enumerate(self._hooks) if hook.optimizer is optimizer), 0)
        begins = not self._stepped or place in self._stepped
        self._stepped = [place] if begins else [*self._stepped, place]
        return begins

    def set_progress(self, progress: float) -> None:
        """Turn the clock from outside (AGP and linear schedules): share of the budget's way covered, in [0, 1]."""
        if self.frozen:
            return
        self.progress = min(1.0, max(0.0, progress))
        self._set_sigma()

    def _set_sigma(self) -> None:
        schedule = self.schedule or Schedule(0, 1, *self.sigmas)
        if not self.frozen:
            sigma, sharpest = schedule.sigma(self.progress), schedule.sigma(1.0)
            for layer, sharp in zip(self.layers.values(), self._sharp(), strict=True):
                layer.set_sigma(sharpest if sharp else sigma, hard=sharp)

    def _sharp(self) -> list[bool]:
        """Whether a layer's group began within its budget: smoothing such a start would only destroy it."""
        if self._start_costs is None:
            return [False] * len(self.layers)
        starts, ends = self._ways()
        lambdas = [goal.budget is None for goal in self.goals.values()]
        within = [starts[group] <= ends[group] for group in self._group_ids]
        return [fits and not fixed for fits, fixed in zip(within, lambdas, strict=True)]

    def _ways(self) -> tuple[list[float], list[float]]:
        """Multiply-adds at which each group begins, and those to end at; infinite where nothing is to shrink."""
        starts, ends, dense = self._zeros(), self._zeros(), self._zeros()
        bounded = [False] * len(ends)
        for goal, layer, cost, group in zip(
            self.goals.values(), self.layers.values(), self._started(), self._group_ids, strict=True
        ):
            size = math.prod(layer.matrix_shape)
            starts[group] += cost
            dense[group] += size
            ends[group] += math.inf if goal.budget is None else goal.budget * size
            bounded[group] |= goal.max_flops < 1
        for group, most in enumerate(dense):
            # The whole budget: layers that cost more than their dense matrices are stored as these.
            if ends[group] >= most <= starts[group] and not bounded[group]:
                ends[group] = math.inf
        return starts, ends

    def _targets(self, device: torch.device) -> Tensor:
        """(G,) multiply-adds that each group may cost now."""
        now = [self._on_the_way(start, end) for start, end in zip(*self._ways(), strict=True)]
        return torch.tensor(now, dtype=torch.float64, device=device)

    def _upper_bounds(self) -> list[float]:
        """Most multiply-adds of each layer now."""
        return [
            self._on_the_way(cost, goal.max_flops * math.prod(layer.matrix_shape))
            for goal, layer, cost in zip(self.goals.values(), self.layers.values(), self._started(), strict=True)
        ]

    def _started(self) -> list[float]:
        if self._start_costs is None:
            raise GBLRError("structure learner: call begin() before the first step")
        return self._start_costs

    def _on_the_way(self, start: float, end: float) -> float:
        """From the starting cost down to ``end``; an ``end`` above the start holds at once."""
        covered = Schedule.ramp(self.progress) if self.schedule is not None else self.progress
        return end if start <= end else start + (end - start) * covered

    def _width_budget(self, device: torch.device) -> WidthBudget:
        total = sum(layer.U.shape[0] for layer in self.layers.values())
        gauges = [layer.pinned is not None for layer in self.layers.values()]
        made_for = device, total, gauges
        if self._budget is None or self._budget_made_for != made_for:
            specs = [
                AxisSpec(layer.axis_lengths, layer.align, layer.U.shape[0], math.prod(layer.matrix_shape))
                for layer in self.layers.values()
            ]
            lower = [goal.min_flops * spec.dense for goal, spec in zip(self.goals.values(), specs, strict=True)]
            upper = [goal.max_flops * spec.dense for goal, spec in zip(self.goals.values(), specs, strict=True)]
            self._budget = WidthBudget(specs, self._group_ids, lower, upper, device, self._pinned(device))
            self._budget_made_for = made_for
        return self._budget

    def _pinned(self, device: torch.device) -> Tensor | None:
        """(C,) bool, components that are not learned; ``None``: all are."""
        layers = list(self.layers.values())
        if all(layer.pinned is None for layer in layers):
            return None
        return torch.cat([layer.ungauged for layer in layers]).to(device)

    def _flat_widths(self) -> Tensor:
        return torch.cat([whole(layer.widths) for layer in self.layers.values()], dim=1)

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer) -> None:
        """Prox-and-clip of the layers that an optimizer has just stepped."""
        flat = self._flat_widths()
        self._check_finite(flat)
        rates, moved = self._all_rates(optimizer)
        in_warmup = self.schedule is not None and self.progress <= 0.0
        if self._begins_round(optimizer) or self._due is None:
            self._due = self._budget_thresholds(flat, rates, in_warmup)
        lambdas = [0.0 if in_warmup else (goal.threshold or 0.0) * self._driven_share() for goal in self.goals.values()]
        fixed, rate = torch.tensor([lambdas, rates], dtype=torch.float64, device=flat.device)
        thresholds = torch.where(self._has_budget(flat.device), self._due, fixed * rate)
        self._prox_and_clip(thresholds, [index for index, moves in enumerate(moved) if moves])
        self._last_rates = rates
        self._last_lambdas = torch.where(rate > 0, thresholds / rate, 0.0)

    def _budget_thresholds(self, flat: Tensor, rates: list[float], in_warmup: bool) -> Tensor:
        """(L,) what each layer shrinks by in one step for its group to meet its present target."""
        if in_warmup or all(goal.budget is None for goal in self.goals.values()):
            return torch.zeros(len(self.layers), dtype=torch.float64, device=flat.device)
        budget, targets = self._width_budget(flat.device), self._targets(flat.device)
        return budget.thresholds(flat, targets, rates, upper=self._upper_bounds())

    def _prox_and_clip(self, thresholds: Tensor, places: Sequence[int] | None = None) -> None:
        """Of the layers at these places; by default of all."""
        layers = list(self.layers.values())
        if places is not None and len(places) < len(layers):
            layers, thresholds = [layers[place] for place in places], thresholds[list(places)]
        # Under FSDP2 each process holds a part, and finds the same thresholds from the whole.
        widths = [own_part(layer.widths) for layer in layers]
        held = [None if layer.pinned is None else part.clone() for layer, part in zip(layers, widths, strict=True)]
        prox_and_clip_(widths, [own_part(layer.locations) for layer in layers], thresholds)
        for layer, part, before in zip(layers, widths, held, strict=True):
            if before is not None:
                part.copy_(torch.where(layer.ungauged, before, part))

    def _driven_share(self) -> float:
        """A fixed lambda is constant under our own schedule, and ramped by a host that turns the clock."""
        return 1.0 if self.schedule is not None else self.progress

    def _has_budget(self, device: torch.device) -> Tensor:
        return torch.tensor([goal.budget is not None for goal in self.goals.values()], device=device)

    def _check_finite(self, flat: Tensor) -> None:
        if flat.is_cuda and self.step_count % _CUDA_CHECK_EVERY:
            return  # reading the answer waits for the GPU
        # The whole of the widths first: all processes go on together, or none.
        if not (bool(torch.isfinite(flat).all()) and all_finite([layer.locations for layer in self.layers.values()])):
            self._raise_non_finite()

    def _raise_non_finite(self) -> None:
        if (cause := find_cause(self.layers, gradients=False)) is not None:
            raise self._diverged(*cause)

    def _diverged(self, name: str, what: str) -> GBLRError:
        """The error to raise; what is known is saved first."""
        loss = None if self.last_loss is None else float(self.last_loss)
        facts = {"step": self.step_count, "layer": name, "what": what, "loss": None if loss is None else str(loss)}
        facts |= {"progress": self.progress, "sigma": self.sigma, "skipped_steps": self.skipped_steps}
        saved = save_diagnostic(self.layers, facts, self.diagnostics)
        return GBLRError(
            f"layer {name!r}: {what} became NaN or infinite at step {self.step_count}; lower the learning rate or clip "
            f"gradients (details in {saved or 'no file: none could be written'})"
        )

    @torch.no_grad()
    def _is_usable(self, optimizer: Optimizer) -> bool:
        """Whether the gradients may be used; raises where the training is to stop."""
        on_cuda = any(layer.widths.is_cuda for layer in self.layers.values())
        if self.non_finite == "stop" and on_cuda and self.step_count % _CUDA_CHECK_EVERY:
            return True
        if gradients_finite(optimizer):
            self._skipped_in_a_row = 0
            return True
        if self.non_finite == "stop" or self._skipped_in_a_row >= _MOST_SKIPPED:
            raise self._diverged(*(find_cause(self.layers) or ("another", "the gradient of a parameter")))
        self._raise_non_finite()
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 1:
            _logger.warning("step %d: gradients are NaN or infinite; the step is skipped", self.step_count)
        return False

    @torch.no_grad()
    def freeze(self) -> None:
        """Meet the budget exactly, settle on whole widths, and fix the structure as exact boxcars."""
        if self.frozen:
            return
        self._raise_non_finite()
        self.begin()
        self.progress = 1.0
        flat = self._flat_widths()
        targets = self._targets(flat.device)
        budget = self._width_budget(flat.device)
        layers, attached = list(self.layers.values()), self._replicated() and bool(self._hooks)
        # At the layers' rates; then all alike, should layers at a rate of zero hold more than the budget.
        for rates in (self._last_rates, None):
            thresholds = budget.thresholds(self._flat_widths(), targets, rates)
            # A step of an unmet budget only: a fixed lambda shrinks once per optimizer step.
            self._prox_and_clip(torch.where(self._has_budget(flat.device), thresholds, 0.0))
        settled = budget.settle(self._flat_widths(), targets)
        for layer, part in zip(layers, settled.split([layer.U.shape[0] for layer in layers], dim=1), strict=True):
            layer.freeze_structure(part, attached=attached)
        self.frozen = True
        self._report_unmet()
        if self.compact and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            for layer in layers:
                layer.compact([hook.optimizer for hook in self._hooks])

    def _report_unmet(self) -> None:
        """Warn about groups that end more than a point under their budget, because live components are too few."""
        cost, dense = self._zeros(), self._zeros()
        for layer, group in zip(self.layers.values(), self._group_ids, strict=True):
            size = math.prod(layer.matrix_shape)
            cost[group] += min(layer.stored, size)  # what costs more is stored as the dense matrix
            dense[group] += size
        named = {group: name for name, group in zip(self.layers, self._group_ids, strict=True)}
        for group, name in named.items():
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
    def sigma(self) -> float | None:
        """Present smoothness; ``None`` is the exact boxcar."""
        return next((layer.sigma for layer in self.layers.values()), None)

    def lambdas(self) -> dict[str, float]:
        """Present lambda per layer: threshold over its own learning rate (paper Algorithm 1); 0 once frozen."""
        if self._last_lambdas is None or self.frozen:
            return dict.fromkeys(self.layers, 0.0)
        return dict(zip(self.layers, self._last_lambdas.tolist(), strict=True))

    @property
    def relative_flops(self) -> float:
        """Multiply-adds of all layers over those of their dense weights."""
        dense = sum(math.prod(layer.matrix_shape) for layer in self.layers.values())
        return sum(layer.stored for layer in self.layers.values()) / dense if dense else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Clock, starting costs, and what is due in this round; everything else is in the layers and the optimizer."""
        return {
            "step_count": self.step_count,
            "progress": self.progress,
            "frozen": self.frozen,
            "start_costs": self._start_costs,
            "rates": self._last_rates,
            "due": None if self._due is None else self._due.tolist(),
            "stepped": self._stepped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; the layers' own state must be loaded too, before or after this.

        Raises:
            ConfigError: For anything but what :meth:`state_dict` gave, for as many layers.
        """
        wanted = self.state_dict().keys()
        missing = [key for key in wanted if not isinstance(state, Mapping) or key not in state]
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
        self._start_costs = state["start_costs"]
        self._last_rates = [float(rate) for rate in state["rates"]]
        device = next((layer.widths.device for layer in self.layers.values()), None)
        self._due = None if state["due"] is None else torch.tensor(state["due"], dtype=torch.float64, device=device)
        self._stepped = list(state["stepped"])
        if self.frozen:
            for layer in self.layers.values():
                layer.freeze_structure()
        elif self._start_costs is not None and not any(layer.structure_frozen for layer in self.layers.values()):
            self._set_sigma()  # where layers are yet to be loaded and frozen, their own state sets it
