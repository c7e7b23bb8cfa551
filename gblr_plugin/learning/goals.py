"""The goals of layers, and the multiply-adds that each layer and group may have at each time of the training."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..errors import ConfigError, GBLRError
from ..layers import GBLRLayer

__all__ = ["CostTargets", "LayerGoal"]


@dataclass(frozen=True)
class LayerGoal:
    """What a layer's structure is to become.

    Args:
        budget: Relative FLOPs to end at, in (0, 1]; lambda is found automatically.
        threshold: A fixed lambda instead of a budget, as in the paper.
        group: Layers of one group share one budget, weighted by their dense multiply-adds; ``None``: the layer has a
            budget of its own.
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


class CostTargets:
    """Multiply-adds that layers, and groups of layers that share one budget, may have while training goes on.

    The target of a group descends from the cost with which the group began to its budget. A group that began within
    its budget, with each layer within its bounds, has nothing to descend to.

    Args:
        layers: Structured layers by name.
        goals: A goal for each.

    Attributes:
        groups: For each layer the number of its group, 0 .. G - 1.
        start_costs: Multiply-adds with which each layer began; ``None`` until :meth:`begin`.

    Raises:
        ConfigError: If the goals of a group contradict each other, its bounds exclude its budget, or layers that are to
            meet a budget are on several devices.
    """

    def __init__(self, layers: Mapping[str, GBLRLayer], goals: Mapping[str, LayerGoal]) -> None:
        self._layers, self._goals = list(layers.values()), list(goals.values())
        self._dense = [math.prod(layer.matrix_shape) for layer in self._layers]
        self.groups = _group_numbers(goals)
        self.start_costs: list[float] | None = None
        self._check_bounds(list(layers))

    def by_group(self, values: list[float]) -> list[float]:
        """(G,) sums over the layers of each group of (L,) values."""
        sums = [0.0] * (max(self.groups, default=-1) + 1)
        for value, group in zip(values, self.groups, strict=True):
            sums[group] += value
        return sums

    def _check_bounds(self, names: list[str]) -> None:
        sizes = list(zip(self._goals, self._dense, strict=True))
        dense = self.by_group([float(size) for size in self._dense])
        least = self.by_group([goal.min_flops * size for goal, size in sizes])
        most = self.by_group([min(goal.max_flops, 2.0) * size for goal, size in sizes])
        for name, layer, goal, group in zip(names, self._layers, self._goals, self.groups, strict=True):
            if goal.budget is None:
                continue
            if layer.widths.device != self._layers[0].widths.device:
                raise ConfigError(f"layer {name!r}: all structured layers must be on one device")
            if not least[group] <= goal.budget * dense[group] <= most[group]:
                raise ConfigError(
                    f"layer {name!r}: the bounds of its group allow relative FLOPs from "
                    f"{least[group] / dense[group]:.4g} to {most[group] / dense[group]:.4g}, "
                    f"which excludes the budget {goal.budget:g}"
                )

    def begin(self) -> None:
        """Record the present costs as those with which the layers began."""
        self.start_costs = [float(layer.stored) for layer in self._layers]

    def _begun(self) -> list[float]:
        if self.start_costs is None:
            raise GBLRError("structure learner: call begin() before the first step")
        return self.start_costs

    def begins_within_budget(self) -> list[bool]:
        """(L,) bool: whether the layer's group has a budget and began within it."""
        if self.start_costs is None:
            return [False] * len(self._layers)
        _, ends = self.starts_and_ends()
        return [
            math.isinf(ends[group]) and goal.budget is not None
            for goal, group in zip(self._goals, self.groups, strict=True)
        ]

    def starts_and_ends(self) -> tuple[list[float], list[float]]:
        """Multiply-adds of each group at the start and the end of its descent; an end is infinite without descent."""
        starts = self.by_group(self._begun())
        dense = self.by_group([float(size) for size in self._dense])
        sizes = list(zip(self._goals, self._dense, strict=True))
        ends = self.by_group([math.inf if goal.budget is None else goal.budget * size for goal, size in sizes])
        # A layer that costs more than its dense matrix is stored as that matrix, so that a budget of 1 is always met.
        stored = [min(start, float(size)) for start, size in zip(self._begun(), self._dense, strict=True)]
        most = [goal.max_flops * size for goal, size in sizes]
        too_large = self.by_group([float(cost > limit) for cost, limit in zip(stored, most, strict=True)])
        for group, end in enumerate(ends):
            if not too_large[group] and end >= min(starts[group], dense[group]):
                ends[group] = math.inf
        return starts, ends

    def of_groups(self, covered: float, device: torch.device) -> Tensor:
        """(G,) float64 multiply-adds that each group may have.

        Args:
            covered: Share of the descent from the starting cost to the budget that is done, in [0, 1].
            device: Device of the result.
        """
        now = [_between(start, end, covered) for start, end in zip(*self.starts_and_ends(), strict=True)]
        return torch.tensor(now, dtype=torch.float64, device=device)

    def of_layers(self, covered: float) -> list[float]:
        """Most multiply-adds of each layer within its group; ``covered`` as for :meth:`of_groups`."""
        bounds = zip(self._goals, self._dense, self._begun(), strict=True)
        return [_between(start, goal.max_flops * size, covered) for goal, size, start in bounds]


def _group_numbers(goals: Mapping[str, LayerGoal]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    asked: dict[int, tuple[float | None, float | None]] = {}
    found = []
    for name, goal in goals.items():
        key: Hashable = ("layer", name) if goal.group is None else ("group", goal.group)
        number = numbers.setdefault(key, len(numbers))
        this = goal.budget, goal.threshold
        if asked.setdefault(number, this) != this:
            raise ConfigError(f"layer {name!r}: group {goal.group!r} has two goals, {asked[number]} and {this}")
        found.append(number)
    return found


def _between(start: float, end: float, covered: float) -> float:
    """Interpolate from the starting cost down to ``end``; if ``end`` is above the start, it is the result at once."""
    return end if start <= end else start + (end - start) * covered
