"""Checks that the families share: of weights, budgets, calibration inputs and options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError
from ..matrix.metric import Metric

__all__ = ["check_count", "check_weight", "output_metric", "too_small"]


def check_weight(family: str, weight: Tensor, budget: float) -> Tensor:
    """The (m, n) weight in float64, once it and the budget are seen to be usable.

    Raises:
        ConfigError: Unless the weight is a finite 2-d floating-point tensor and the budget a number in (0, 1].
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point or not weight.numel():
        what = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"{family}: weight must be a non-empty 2-d floating-point tensor (m, n), got {what}")
    if weight.is_meta:
        raise ConfigError(f"{family}: weight is on the meta device, it has no values to approximate")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ConfigError(f"{family}: budget must be a number in (0, 1], got {budget!r}")
    weight = weight.detach().double()
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{family}: weight holds NaN or infinite values")
    return weight


def output_metric(family: str, calibration: Tensor | Metric | None, weight: Tensor) -> Metric:
    """The norm of output errors over calibration inputs; the Frobenius norm without any.

    Raises:
        ConfigError: Unless the inputs are finite (N, n) rows or an (n, n) second moment.
    """
    if calibration is None:
        return Metric()
    if isinstance(calibration, Metric):
        return calibration
    n = weight.shape[1]
    if (
        not isinstance(calibration, Tensor)
        or calibration.dim() != 2
        or calibration.shape[1] != n
        or not len(calibration)
    ):
        what = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
        raise ConfigError(f"{family}: calibration must be (N, {n}) inputs or an ({n}, {n}) second moment, got {what}")
    data = calibration.detach().to(weight)
    if not bool(torch.isfinite(data).all()):
        raise ConfigError(f"{family}: calibration holds NaN or infinite values")
    is_moment = len(data) == n and torch.allclose(data, data.T, rtol=1e-4, atol=1e-6 * float(data.abs().max()))
    return Metric.from_moment(data if is_moment else data.T @ data / len(data))


def too_small(family: str, shape: torch.Size, max_multiply_adds: int, least: int, what: str) -> BudgetError:
    """The error of a budget that does not pay for the smallest member of a family."""
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
