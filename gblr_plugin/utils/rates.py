"""The schedule of learning rates that every training of this package uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["WarmupCosine"]


@dataclass(frozen=True)
class WarmupCosine:
    """Factor of the learning rate: linear up over the first ``warmup`` of ``steps``, then a half cosine to 0."""

    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        """Factor in [0, 1]."""
        rise = max(self.warmup * self.steps, 1.0)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(self.steps - rise, 1.0), 1.0)))
