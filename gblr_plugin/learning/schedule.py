"""Schedules of structure learning as pure functions of a step: progress, smoothness, budget ramp."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from ..errors import ConfigError

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, homotopy and cool-down, in optimizer steps (paper App. A.7.2).

    Args:
        warmup_step: Steps before anything shrinks; sigma stays at ``sigma_start``.
        cooldown_begin_step: Step at which sigma has reached ``sigma_end``, the budget is met, and the structure is
            frozen as exact boxcars. What is trained from here on is what is counted and deployed.
        sigma_start: Smoothness at the start; 1 is very smooth.
        sigma_end: Smoothness just before the cool-down; 100 is close to the boxcar.

    Raises:
        ConfigError: Unless all are numbers with ``0 <= warmup_step < cooldown_begin_step`` and
            ``0 < sigma_start <= sigma_end``.
    """

    warmup_step: int
    cooldown_begin_step: int
    sigma_start: float = 1.0
    sigma_end: float = 100.0

    def __post_init__(self) -> None:
        for name in ("warmup_step", "cooldown_begin_step", "sigma_start", "sigma_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ConfigError(f"schedule: {name} must be a number, got {value!r}")
        if not 0 <= self.warmup_step < self.cooldown_begin_step:
            raise ConfigError(
                f"schedule: need 0 <= warmup_step < cooldown_begin_step, got {self.warmup_step} and "
                f"{self.cooldown_begin_step}"
            )
        if not 0 < self.sigma_start <= self.sigma_end:
            raise ConfigError(
                f"schedule: need 0 < sigma_start <= sigma_end, got {self.sigma_start} and {self.sigma_end}"
            )

    def progress(self, step: int) -> float:
        """Progress after ``step`` optimizer steps: 0 until the warm-up ends, then linear to 1 at the cool-down."""
        span = self.cooldown_begin_step - self.warmup_step
        return min(1.0, max(0.0, (step - self.warmup_step) / span))

    def sigma(self, progress: float) -> float:
        """Smoothness at a progress in [0, 1]: linear, as published."""
        return self.sigma_start + (self.sigma_end - self.sigma_start) * progress

    @staticmethod
    def ramp(progress: float) -> float:
        """Share of the descent to the budget at a progress: the cubic ramp of NNI's MovementPruner and AGPPruner."""
        return 1.0 - (1.0 - progress) ** 3
