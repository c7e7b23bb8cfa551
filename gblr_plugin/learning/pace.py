"""Rates of factors: how far a structured layer's factors move in a step of an optimizer that normalises gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..layers import StructuredLayer
from .step_hook import StepHook

__all__ = ["PACE", "FactorPace"]

PACE = 8.0
"""Pace of factors that approximate a trained weight; it is measured in docs/results/pattern-or-allocation.md."""

_RISE = 10  # steps in which the pace rises to its full value after factors were replaced


class FactorPace:
    """Lets the factors of layers move further in a step than the optimizer moves dense weights.

    Adam and its relatives move every entry by about the learning rate, whatever its gradient. A learning rate that is
    right for a dense weight is too low for factors, whose products change by less (Qiu et al. 2024, "Compute Better
    Spent": rates in inverse proportion to the fan-in of each factor). The factors of a layer therefore move by ``pace``
    times what the optimizer moves them, which for these optimizers is a learning rate ``pace`` times as high. Steps of
    optimizers that do not normalise gradients (SGD) are left alone.

    Args:
        layers: The layers.
        pace: At least 1; 1 does nothing.

    Attributes:
        steps: Steps taken since factors were replaced.
    """

    def __init__(self, layers: Sequence[StructuredLayer], pace: float) -> None:
        self._layers, self.pace = list(layers), pace
        self._before: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[StepHook] = []
        self.steps = _RISE

    def restart(self) -> None:
        """Let the pace rise anew, since factors were replaced in the midst of a training."""
        self.steps = 0

    def follow(self, optimizer: Optimizer) -> None:
        """Move the factors further after each step of an optimizer, until :meth:`release`."""

        def before() -> bool:
            self.before_step(optimizer, active=True)
            return True

        self._hooks.append(StepHook(optimizer, self.after_step, usable=before))

    def release(self) -> None:
        """Leave the optimizers that are followed as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def before_step(self, optimizer: Optimizer, active: bool) -> None:
        """Remember the factors that a step is going to change.

        Args:
            optimizer: It is going to step.
            active: Whether the layers hold factors that are to move further, and not their dense weights.
        """
        self._before = []
        if active and self.pace != 1 and all("betas" in group for group in optimizer.param_groups):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            factors = [factor for layer in self._layers for factor in layer.factors().values()]
            moving = [factor for factor in factors if id(factor) in held and factor.grad is not None]
            self._before = [(factor, factor.detach().clone()) for factor in moving]

    @torch.no_grad()
    def after_step(self) -> None:
        """Move these factors further."""
        if self._before:
            self.steps += 1
            pace = 1 + (self.pace - 1) * min(1.0, self.steps / _RISE)
            factors, before = ([pair[side] for pair in self._before] for side in (0, 1))
            # before + pace (now - before), in place
            torch._foreach_lerp_(factors, before, 1 - pace)
            self._before = []
