"""Takes the proximal steps of layers whose widths one or several optimizers hold.

After a step of an optimizer, the layers whose widths it holds shrink by the lambda of their group times their learning
rate. A group's lambda is chosen once per round, so that the group meets its target if each of its layers takes one
step. A round ends when one of its optimizers steps again. So the layers of a group shrink by the same lambda, whatever
the order of the optimizers; growth by the gradients of later optimizers in a round is counted in the next round. Layers
whose weights are frozen and in no optimizer shrink with the first optimizer, at its largest learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..layers import GBLRLayer
from ..layers.distributed_parameters import full_tensor, local_part
from .budget import AxisSpec, WidthBudget
from .goals import CostTargets, LayerGoal
from .optimizers import learning_rates
from .proximal import prox_and_clip_

__all__ = ["Shrinker"]


class Shrinker:
    """Shrinks the widths of layers towards their targets.

    Args:
        layers: Structured layers by name.
        goals: The goal of each layer.
        costs: Multiply-adds that layers and groups may have.

    Attributes:
        rates: Learning rate of each layer's widths at the last step.
        due: (L,) thresholds, in this round, of the layers that have a budget; ``None`` before the first round.
        stepped: Indices of the optimizers that have stepped in this round.
    """

    def __init__(self, layers: Mapping[str, GBLRLayer], goals: Mapping[str, LayerGoal], costs: CostTargets) -> None:
        self._layers, self._goals, self._costs = list(layers.values()), list(goals.values()), costs
        self.rates = [0.0] * len(self._layers)
        self.due: Tensor | None = None
        self.stepped: list[int] = []
        self._lambdas: Tensor | None = None
        self._budget: WidthBudget | None = None
        self._budget_made_for: tuple[torch.device, int] | None = None

    def widths(self) -> Tensor:
        """(2, C) present widths of all layers side by side, without gradient; under FSDP2 all processes call it."""
        return torch.cat([full_tensor(layer.widths) for layer in self._layers], dim=1)

    def lambdas(self) -> list[float]:
        """Lambda of each layer at the last step: its threshold over its learning rate."""
        return [0.0] * len(self._layers) if self._lambdas is None else self._lambdas.tolist()

    def step(
        self,
        flat: Tensor,
        optimizer: Optimizer,
        optimizers: Sequence[Optimizer],
        *,
        covered: float,
        fixed: float,
        in_warmup: bool,
    ) -> None:
        """Prox-and-clip of the layers that an optimizer has just stepped.

        Args:
            flat: The present :meth:`widths`.
            optimizer: The optimizer that has stepped.
            optimizers: All optimizers that hold widths of these layers, in order.
            covered: Share of the descent to the budgets that is done.
            fixed: Share of the fixed lambdas that holds now.
            in_warmup: Whether nothing shrinks yet.
        """
        rates, moved = self._rates(optimizer, optimizers or [optimizer])
        if self._begins_round(optimizer, optimizers) or self.due is None:
            self.due = self._thresholds(flat, rates, covered, in_warmup)
        lambdas = [0.0 if in_warmup else (goal.threshold or 0.0) * fixed for goal in self._goals]
        lam, rate = torch.tensor([lambdas, rates], dtype=torch.float64, device=flat.device)
        thresholds = torch.where(self._have_budgets(flat.device), self.due, lam * rate)
        self._prox_and_clip(thresholds, [index for index, moves in enumerate(moved) if moves])
        self.rates = rates
        self._lambdas = torch.where(rate > 0, thresholds / rate, 0.0)

    def _rates(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> tuple[list[float], list[bool]]:
        """Learning rate of each layer's widths, and whether a step of this optimizer moves them."""
        parameters = [layer.widths for layer in self._layers]
        here = learning_rates(optimizer, parameters)
        anywhere = [learning_rates(each, parameters) for each in optimizers]
        largest = max((rate for rate in anywhere[0] if rate is not None), default=0.0)
        rates, moved = [], []
        for layer, goal, rate, *others in zip(self._layers, self._goals, here, *anywhere, strict=True):
            known, moves = next((value for value in (rate, *others) if value is not None), None), rate is not None
            if known is None and not layer.widths.requires_grad and goal.budget is not None:
                known, moves = largest, optimizer is optimizers[0]
            rates.append(known or 0.0)
            moved.append(moves)
        return rates, moved

    def _begins_round(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> bool:
        """Whether this step begins a new round, because the optimizer has already stepped in the present round."""
        place = next((index for index, each in enumerate(optimizers) if each is optimizer), 0)
        begins = not self.stepped or place in self.stepped
        self.stepped = [place] if begins else [*self.stepped, place]
        return begins

    def _thresholds(self, flat: Tensor, rates: list[float], covered: float, in_warmup: bool) -> Tensor:
        """(L,) threshold of each layer in one step, by which its group meets its present target."""
        if in_warmup or all(goal.budget is None for goal in self._goals):
            return torch.zeros(len(self._layers), dtype=torch.float64, device=flat.device)
        targets = self._costs.of_groups(covered, flat.device)
        return self.width_budget(flat.device).thresholds(flat, targets, rates, upper=self._costs.of_layers(covered))

    def width_budget(self, device: torch.device) -> WidthBudget:
        """The search for thresholds; it is made anew after components were dropped."""
        made_for = device, sum(layer.U.shape[0] for layer in self._layers)
        if self._budget is None or self._budget_made_for != made_for:
            specs = [
                AxisSpec(layer.axis_lengths, layer.align, layer.U.shape[0], math.prod(layer.matrix_shape))
                for layer in self._layers
            ]
            sizes = list(zip(self._goals, specs, strict=True))
            lower = [goal.min_flops * spec.dense for goal, spec in sizes]
            upper = [goal.max_flops * spec.dense for goal, spec in sizes]
            self._budget = WidthBudget(specs, self._costs.groups, lower, upper, device)
            self._budget_made_for = made_for
        return self._budget

    def _prox_and_clip(self, thresholds: Tensor, places: Sequence[int] | None = None) -> None:
        """Take the proximal step of the layers at these indices, by default of all layers."""
        layers = self._layers
        if places is not None and len(places) < len(layers):
            layers, thresholds = [layers[place] for place in places], thresholds[list(places)]
        # Under FSDP2 each process shrinks the widths that it holds; all have found the same thresholds.
        widths, locations = ([local_part(getattr(layer, name)) for layer in layers] for name in ("widths", "locations"))
        prox_and_clip_(widths, locations, thresholds)

    def _have_budgets(self, device: torch.device) -> Tensor:
        return torch.tensor([goal.budget is not None for goal in self._goals], device=device)

    def final_widths(self) -> list[Tensor]:
        """Meet the budgets exactly and round: (2, K) int64 widths of each layer."""
        device = self._layers[0].widths.device
        targets, budget = self._costs.of_groups(1.0, device), self.width_budget(device)
        # First in proportion to the learning rates; then equally, in case layers at a rate of 0 exceed the budget.
        for rates in (self.rates, None):
            thresholds = budget.thresholds(self.widths(), targets, rates)
            # Layers with a fixed lambda do not shrink here: they shrink once per optimizer step.
            self._prox_and_clip(torch.where(self._have_budgets(device), thresholds, 0.0))
        rounded = budget.rounded(self.widths(), targets)
        return list(rounded.split([layer.U.shape[0] for layer in self._layers], dim=1))
