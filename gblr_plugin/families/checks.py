"""Checks that the families share: of weights with their budgets, and of options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError
from ..utils import validation

__all__ = ["check_count", "check_weight", "too_small"]


def check_weight(family: str, weight: Tensor, budget: float) -> Tensor:
    """The (m, n) weight in float64, once it and the budget are seen to be usable.

    Raises:
        ConfigError: Unless the weight is a finite 2-d floating-point tensor and the budget a number in (0, 1].
    """
    validation.check_weight(f"{family}: weight", weight)
    validation.check_share(f"{family}: budget", budget)
    return weight.detach().double()


def too_small(family: str, shape: torch.Size, max_multiply_adds: int, least: int, what: str) -> BudgetError:
    """The error for a budget below the cost of a family's smallest member."""
    m, n = shape
    return BudgetError(
        f"{family}: the budget allows {max_multiply_adds} of the {m * n} multiply-adds of a {m} x {n} matrix, fewer "
        f"than the {least} of {what}; raise the budget or leave this matrix dense"
    )


def check_count(family: str, name: str, value: Any, most: int) -> int:
    """An option that counts something: an int in [1, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{family}: {name} must be an integer from 1 to {most}, got {value!r}")
    return value
