"""Curves of error over multiply-adds, and the split of a budget over layers at which their errors are smallest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Curve", "least_maximum", "least_sum", "straight_curve"]


@dataclass(frozen=True, eq=False)
class Curve:
    """The error of a layer's approximation at several costs.

    Args:
        cost: (J,) float64 multiply-adds, strictly increasing.
        error: (J,) float64 error at that cost, not increasing.
    """

    cost: Tensor
    error: Tensor

    @classmethod
    def envelope(cls, cost: Tensor, error: Tensor) -> Curve:
        """The curve of some choices: at each cost, the least error of the choices that cost no more."""
        order = torch.argsort(cost, stable=True)
        cost, error = cost[order].double(), error[order].double().cummin(0).values
        last = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
        last[:-1] = cost[1:] > cost[:-1]
        return cls(cost[last], error[last])


def straight_curve(size: int) -> Curve:
    """An error that falls linearly to 0 at the dense cost, so that :func:`least_maximum` gives equal shares."""
    cost = torch.arange(0, 1001, dtype=torch.float64) * (size / 1000)
    return Curve(cost, 1 - cost / size)


def least_sum(
    curves: Mapping[str, Curve], max_multiply_adds: float, low: Mapping[str, float], high: Mapping[str, float]
) -> dict[str, float]:
    """Multiply-adds of each layer that minimise the sum of the convex hulls of the curves.

    Args:
        curves: Curve of each layer.
        max_multiply_adds: Multiply-adds of all layers together, at least those of ``low``.
        low: Least multiply-adds of each layer.
        high: Most multiply-adds of each layer.

    Returns:
        Multiply-adds by layer, within the bounds, in total at most ``max_multiply_adds``.
    """
    spent = {name: float(low[name]) for name in curves}
    pieces: list[tuple[float, str, float]] = []
    for name, curve in curves.items():
        cost, error = _hull(curve)
        for begin, end, high_error, low_error in zip(cost[:-1], cost[1:], error[:-1], error[1:], strict=True):
            width = min(end, high[name]) - max(begin, low[name])
            if width > 0 and high_error > low_error:
                pieces.append(((high_error - low_error) / (end - begin), name, width))
    left = max_multiply_adds - sum(spent.values())
    # A layer's own pieces come in order, since slopes of a hull fall.
    for _, name, width in sorted(pieces, key=lambda piece: -piece[0]):
        added = min(width, left)
        spent[name] += added
        left -= added
        if left <= 0:
            break
    return _spread(spent, max(left, 0.0), high)


def least_maximum(
    curves: Mapping[str, Curve], max_multiply_adds: float, low: Mapping[str, float], high: Mapping[str, float]
) -> dict[str, float]:
    """Multiply-adds of each layer that minimise the largest error over layers; arguments as :func:`least_sum`.

    Multiply-adds that are too few for the next smaller error are shared out in proportion.
    """

    def least_cost(level: float) -> dict[str, float]:
        chosen = {}
        for name, curve in curves.items():
            index = min(int((curve.error > level).sum()), len(curve.cost) - 1)
            chosen[name] = min(max(float(curve.cost[index]), low[name]), high[name])
        return chosen

    levels = torch.cat([curve.error.cpu() for curve in curves.values()]).unique()
    begin, end = 0, len(levels)
    spent = {name: float(low[name]) for name in curves}
    while begin < end:
        middle = (begin + end) // 2
        trial = least_cost(float(levels[middle]))
        if sum(trial.values()) <= max_multiply_adds * (1 + 1e-12):
            spent, end = trial, middle
        else:
            begin = middle + 1
    return _spread(spent, max(max_multiply_adds - sum(spent.values()), 0.0), high)


def _hull(curve: Curve) -> tuple[list[float], list[float]]:
    """Lower convex hull of a curve, by cost (Andrew's monotone chain)."""
    points: list[tuple[float, float]] = []
    for x, y in zip(curve.cost.tolist(), curve.error.tolist(), strict=True):
        while len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            points.pop()
        points.append((x, y))
    return [x for x, _ in points], [y for _, y in points]


def _spread(spent: dict[str, float], left: float, high: Mapping[str, float]) -> dict[str, float]:
    """Share out the multiply-adds that are left in proportion, up to the bounds."""
    while left > 1e-9 * max(1.0, sum(spent.values())):
        open_to_more = {name: cost for name, cost in spent.items() if cost < high[name] * (1 - 1e-12)}
        if not open_to_more:
            break
        total = sum(open_to_more.values())
        share = left
        for name, cost in open_to_more.items():
            more = min(share * (cost / total if total > 0 else 1 / len(open_to_more)), high[name] - cost)
            spent[name] += more
            left -= more
    return spent
