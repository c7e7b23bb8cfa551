r"""Splits one budget of multiply-adds over layers by a named rule, in the same manner for every family.

A rule gives each layer a curve of its error over its multiply-adds. The curves are those of low-rank approximations
counted in trapezoid form (r (m + n) - r (r - 1) for rank r), computed from one singular value decomposition per layer:

* ``weight``: the share of ``||W||_F^2`` that is lost.
* ``output``: the share of the output's energy ``E||W x||^2`` that is lost over calibration inputs.
* ``sensitivity``: the rise of the loss to second order, with the Fisher matrix factored as E[x x^T] times E[g g^T], g
  being the loss gradient at the layer's output (K-FAC, Martens & Grosse 2015): leaving out component k of the whitened
  weight costs ``s_k^2 u_k^T E[g g^T] u_k``.

The sum of the errors is then made as small as the budget allows, exactly for the curves' convex hulls: pieces are
taken in order of error saved per multiply-add. ``alds`` makes the largest relative spectral error as small as possible
instead (Liebenwein et al. 2021); ``uniform`` gives every layer the same share.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..decomposition.curves import Curve, least_maximum, least_sum, straight_curve
from ..errors import ConfigError
from ..families.alds import error_curve
from ..layers.dense import check_structurable, weight_matrix
from ..matrix.metric import Metric
from ..matrix.svd import singular_triplets
from ..utils.validation import check_choice, check_share
from .batches import Calibration
from .layer_moments import layer_moments

__all__ = ["FLOOR", "RULES", "allocate", "allocate_by_moments", "check_rule"]

RULES = ("uniform", "weight", "output", "sensitivity", "alds")
"""Names of the rules."""

FLOOR = 0.1
"""Least share of the group's relative budget that a layer without a bound of its own gets."""

SMALLEST = 1.25
"""Least multiply-adds of such a layer over those of rank 1: what the smallest member of every family costs."""

Bounds = Mapping[str, tuple[float, float]]


def check_rule(rule: str, calibration: object | None) -> None:
    """Refuse an unknown rule, or one that needs batches where there are none.

    Raises:
        ConfigError: In one line.
    """
    check_choice("allocation:", rule, RULES)
    if rule in ("output", "sensitivity") and calibration is None:
        raise ConfigError(f"allocation: rule {rule!r} needs calibration batches; give calibration, or choose 'weight'")


def allocate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    budget: float,
    rule: str = "weight",
    *,
    calibration: Calibration | None = None,
    bounds: Bounds | None = None,
    row_splits: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Split one budget over the layers of a model.

    Args:
        model: Only looked at; run on the calibration batches by the rules that need them.
        layers: Its Linear, Conv1d, Conv2d or Hugging Face ``Conv1D`` modules by name.
        budget: Relative FLOPs of all layers together, in (0, 1].
        rule: One of ``RULES``.
        calibration: Batches, for ``output``; for ``sensitivity`` its forward must return the loss.
        bounds: Least and most relative FLOPs by layer name. By default the least is ``FLOOR`` times the budget, and
            rank 1 where the budget allows that; the most is 1.
        row_splits: Matrices packed in the rows of a layer's weight, by name; 1 where absent.

    Returns:
        Relative FLOPs by layer name; weighted by the layers' sizes they add up to at most the budget.

    Raises:
        ConfigError: If the rule is unknown or lacks batches, a layer is never run, or bounds exclude the budget.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> shares = allocate(model, {"0": model[0], "1": model[1]}, 0.25)
        >>> 64 * 64 * shares["0"] + 64 * 8 * shares["1"] <= 0.25 * (64 * 64 + 64 * 8)
        True
    """
    check_rule(rule, calibration)
    check_share("allocation: budget", budget, "relative FLOPs")
    for name, module in layers.items():
        check_structurable(module, name)
    splits = {name: 1 if row_splits is None else row_splits.get(name, 1) for name in layers}
    weights = {name: weight_matrix(module) for name, module in layers.items()}
    limits = _limits(weights, splits, budget, bounds or {})
    if rule == "uniform":
        curves = {name: straight_curve(weight.numel()) for name, weight in weights.items()}
        return _shares(weights, least_maximum(curves, budget * _size(weights), *limits))
    if rule == "alds":
        curves = {name: error_curve(weight, splits[name]) for name, weight in weights.items()}
        return _shares(weights, least_maximum(curves, budget * _size(weights), *limits))
    curves = _spectral_curves(model, layers, rule, calibration, splits)
    return _shares(weights, least_sum(curves, budget * _size(weights), *limits))


def allocate_by_moments(
    weights: Mapping[str, Tensor],
    budget: float,
    metrics: Mapping[str, Metric],
    gradients: Mapping[str, Tensor],
    *,
    bounds: Bounds | None = None,
    row_splits: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Split one budget by the rule ``sensitivity``, from moments that were taken elsewhere.

    Args:
        weights: (m, n) matrices by layer name.
        budget: Relative FLOPs of all layers together, in (0, 1].
        metrics: Of each layer's inputs.
        gradients: (m, m) second moment of the loss gradients at each layer's output; where all are zero, or there are
            none, the shares of the outputs' energy that are lost are added up in their place.
        bounds: As :func:`allocate` takes them.
        row_splits: The same.

    Returns:
        Relative FLOPs by layer name; weighted by the layers' sizes they add up to at most the budget.

    Raises:
        ConfigError: If bounds exclude the budget.
    """
    splits = {name: 1 if row_splits is None else row_splits.get(name, 1) for name in weights}
    limits = _limits(weights, splits, budget, bounds or {})
    if not any(float(gradient.diagonal().sum()) > 0 for gradient in gradients.values()):
        gradients = {}
    curves = {
        name: _curve(weight, metrics[name], gradients.get(name), splits[name]) for name, weight in weights.items()
    }
    return _shares(weights, least_sum(curves, budget * _size(weights), *limits))


def _size(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())


def _shares(weights: Mapping[str, Tensor], spent: Mapping[str, float]) -> dict[str, float]:
    return {name: min(1.0, spent[name] / weight.numel()) for name, weight in weights.items()}


def _limits(
    weights: Mapping[str, Tensor], splits: Mapping[str, int], budget: float, bounds: Bounds
) -> tuple[dict[str, float], dict[str, float]]:
    """Least and most multiply-adds of each layer, with the defaults where no bounds are given.

    Raises:
        ConfigError: If they exclude the budget.
    """
    low, high = {}, {}
    for name, weight in weights.items():
        rows, cols = weight.shape
        size, (least, most) = rows * cols, bounds.get(name, (0.0, 1.0))
        low[name], high[name] = least * size, min(most, 1.0) * size
        if low[name] <= 0:
            smallest = SMALLEST * (rows + splits[name] * cols)
            low[name] = max(FLOOR * budget * size, min(smallest, budget * size))
        low[name] = min(low[name], high[name])
    least, most, total = sum(low.values()), sum(high.values()), _size(weights)
    if not least <= budget * total * (1 + 1e-9) or not budget * total <= most * (1 + 1e-9):
        raise ConfigError(
            f"allocation: the bounds of the layers allow relative FLOPs from {least / total:.4g} to "
            f"{most / total:.4g}, which excludes the budget {budget:g}"
        )
    return low, high


def _spectral_curves(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rule: str,
    calibration: Calibration | None,
    splits: Mapping[str, int],
) -> dict[str, Curve]:
    if rule == "weight" or calibration is None:
        return {name: _curve(weight_matrix(module), Metric(), None, splits[name]) for name, module in layers.items()}
    inputs, gradients = layer_moments(model, layers, calibration, gradients=rule == "sensitivity")
    if gradients and not any(float(gradient.diagonal().sum()) > 0 for gradient in gradients.values()):
        raise ConfigError("allocation: all loss gradients are zero; there is nothing to weigh layers by")
    metrics = {name: Metric.from_moment(moment, calibration.damping) for name, moment in inputs.items()}
    return {
        name: _curve(weight_matrix(module), metrics[name], gradients.get(name), splits[name])
        for name, module in layers.items()
    }


def _curve(weight: Tensor, metric: Metric, gradient: Tensor | None, row_splits: int) -> Curve:
    """Error over cost of low rank counted in trapezoid form; a share of the energy unless gradients weigh it."""
    if len(weight) % row_splits:
        raise ConfigError(f"allocation: row_splits {row_splits} does not divide {len(weight)} rows")
    lost: list[Tensor] = []
    rows, n = len(weight) // row_splits, weight.shape[1]
    for index, split in enumerate(metric.whiten(weight.double()).chunk(row_splits)):
        left, values, _ = singular_triplets(split)
        energy = values.square()
        if gradient is not None:
            here = slice(index * rows, (index + 1) * rows)
            energy = energy * ((gradient[here, here] @ left) * left).sum(0)
        lost.append(energy)
    gains = torch.stack(lost).sum(0).cpu()
    total = gains.sum()
    if gradient is None:
        gains = gains / total.clamp(min=torch.finfo(torch.float64).tiny)
    rank = torch.arange(len(gains) + 1, dtype=torch.float64)
    error = torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])
    return Curve(row_splits * (rank * (rows + n) - rank * (rank - 1)).clamp(max=rows * n), error)
