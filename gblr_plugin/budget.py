"""Find the shrinkage that meets a budget: lambda from relative FLOPs.

Minimising the task loss subject to a bound on the widths' l1 norm is proximal gradient descent whose threshold is the
multiplier of that bound: after each gradient step the widths are soft-thresholded by the one value that brings their
*counted* cost to the target. That value over the learning rate is the lambda that the published method grid-searches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .structure import multiply_adds

__all__ = ["AxisSpec", "WidthBudget"]

_WAYS = 8  # candidates evaluated at once: few launches on a GPU, little waste on a CPU
_ROUNDS = 6


@dataclass(frozen=True)
class AxisSpec:
    """What a layer's widths count.

    Args:
        axis_lengths: Rows (per split) and columns that a normalised width of 1 covers.
        align: Tile of rows and columns to which intervals snap.
        num_components: K, over all splits.
        dense: Multiply-adds of the dense product, m * n.
    """

    axis_lengths: tuple[int, int]
    align: tuple[int, int]
    num_components: int
    dense: int


class WidthBudget:
    """Per-layer thresholds that bring groups of layers to their targets, found by exact counting.

    Args:
        specs: One per layer.
        groups: (L,) group of each layer, 0 .. G - 1; layers of a group share one target.
        lower: Least multiply-adds of each layer within its group (``max_sparse_ratio``); default 0.
        upper: Most multiply-adds of each layer within its group (``min_sparse_ratio``); default none.
        device: Where the widths live.

    Raises:
        ConfigError: If a lower bound exceeds an upper bound.
    """

    def __init__(
        self,
        specs: Sequence[AxisSpec],
        groups: Sequence[int],
        lower: Sequence[float] | None = None,
        upper: Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_layers = len(specs)
        self.num_groups = max(groups, default=-1) + 1
        self.device = torch.device("cpu" if device is None else device)
        counts = torch.tensor([spec.num_components for spec in specs])
        layer = torch.arange(self.num_layers).repeat_interleave(counts)

        def per_component(values: list[tuple[int, int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).T[:, layer].to(device)

        self._layer = layer.to(device)
        self._length = per_component([spec.axis_lengths for spec in specs])
        self._tile = per_component([spec.align for spec in specs])
        self._group = torch.tensor(list(groups), dtype=torch.int64).to(device)
        low = [0.0] * self.num_layers if lower is None else list(lower)
        high = [math.inf] * self.num_layers if upper is None else list(upper)
        for index, (a, b) in enumerate(zip(low, high, strict=True)):
            if a > b:
                raise ConfigError(f"budget: layer {index} must cost at least {a:g} and at most {b:g} multiply-adds")
        self._lower = torch.tensor(low, dtype=torch.float64).to(device)
        self._upper = torch.tensor(high, dtype=torch.float64).to(device)
        self._bounded = any(a > 0 for a in low) or any(b < math.inf for b in high)

    def snap(self, widths: Tensor) -> Tensor:
        """Integer widths ((..., 2, C) int64) of normalised widths, as the masks round them."""
        # The arithmetic of mask.integer_widths in the widths' own dtype, so that counts agree with masks.
        scale = (self._length / self._tile).to(widths.dtype)
        whole = torch.round(widths * scale).to(torch.float64) * self._tile
        return torch.minimum(whole, self._length).long()

    def layer_cost(self, widths: Tensor) -> Tensor:
        """Multiply-adds per layer, (..., L) int64, of normalised widths (..., 2, C)."""
        whole = self.snap(widths)
        cost = multiply_adds(whole[..., 0, :], whole[..., 1, :])
        return cost.new_zeros(*cost.shape[:-1], self.num_layers).index_add_(-1, self._layer, cost)

    def _shrunk_cost(self, widths: Tensor, threshold: Tensor) -> Tensor:
        """(W, L) cost after shrinking by thresholds (W, L); a negative threshold grows live widths only."""
        step = threshold.to(widths.dtype)[:, None, self._layer]
        return self.layer_cost(torch.where((step < 0) & (widths <= 0), widths, widths - step).clamp(0, 1))

    def _search(
        self, widths: Tensor, target: Tensor, group: Tensor, growth: float, clamp: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """(G,) smallest threshold in [-growth, 1] at which each group's cost is at most its target."""
        num = target.numel()
        low = torch.full_like(target, -growth)
        high = torch.full_like(target, 1.0)
        fraction = torch.arange(_WAYS + 1, dtype=target.dtype, device=target.device)[:, None] / _WAYS
        for _ in range(_ROUNDS):
            candidates = low + (high - low) * fraction  # (W + 1, G)
            threshold = candidates[:, group]
            if clamp is not None:
                threshold = threshold.maximum(clamp[0]).minimum(clamp[1])
            cost = self._shrunk_cost(widths, threshold)
            total = cost.new_zeros(_WAYS + 1, num).index_add_(1, group, cost)
            fits = (total <= target).int().cummax(0).values  # rounding may make the count wobble: take the first fit
            first = (_WAYS + 1 - fits.sum(0)).clamp(max=_WAYS)
            high = candidates.gather(0, first[None])[0]
            low = candidates.gather(0, (first - 1).clamp(min=0)[None])[0]
        return high

    @torch.no_grad()
    def thresholds(self, widths: Tensor, targets: Tensor, growth: float = 0.0) -> Tensor:
        """Thresholds for :func:`~gblr_plugin.proximal.prox_and_clip_`.

        Args:
            widths: (2, C) normalised widths of all layers side by side, after the gradient step.
            targets: (G,) multiply-adds per group; ``inf`` leaves a group alone.
            growth: Most that the live widths of a group below its target may grow, as a fraction of the axis.

        Returns:
            (L,) float64; after the shrinkage no group exceeds its target (unless its lower bounds alone do).
        """
        targets = targets.to(self._upper)
        clamp = None
        if self._bounded:
            each = torch.arange(self.num_layers, device=widths.device)
            least = self._search(widths, self._upper, each, growth)
            most = self._search(widths, self._lower, each, growth)
            # `most` just undershoots the lower bound: step back by the resolution of the search.
            clamp = least, torch.maximum(most - 2.0 * float(_WAYS) ** -_ROUNDS, least)
        threshold = self._search(widths, targets, self._group, growth, clamp)
        threshold = torch.where(targets.isinf(), torch.zeros_like(threshold), threshold)[self._group]
        return threshold if clamp is None else threshold.maximum(clamp[0]).minimum(clamp[1])

    @torch.no_grad()
    def settle(self, widths: Tensor, targets: Tensor) -> Tensor:
        """Whole widths that use each group's target up to less than one step of one interval.

        Args:
            widths: (2, C) normalised widths that already meet the targets.
            targets: (G,) multiply-adds per group; ``inf`` only rounds.

        Returns:
            (2, C) int64 widths. The widths whose rounding lost most are raised first; a live width only grows.
        """
        whole = self.snap(widths).to(torch.float64)
        component_group = self._group[self._layer]
        targets = targets.to(self._upper)
        for _ in range(int(self._length.max())):  # ends far earlier: each pass raises every live width once at most
            cost = self._costs_of(whole)
            slack = targets - cost.new_zeros(self.num_groups).index_add_(0, self._group, cost)
            room = self._upper - cost
            live = (whole > 0).all(0) & torch.isfinite(slack)[component_group]
            step = torch.minimum(self._tile, self._length - whole)
            lost = widths.to(torch.float64) - whole / self._length
            usable = live & (step > 0) & (step <= slack[component_group]) & (step <= room[self._layer])
            if not bool(usable.any()):
                break
            order = torch.where(usable, lost, -torch.inf).flatten().argsort(descending=True, stable=True)
            order = order[usable.flatten()[order]]
            flat_step = step.flatten()[order]
            column = order % whole.shape[1]
            fits = torch.ones_like(order, dtype=torch.bool)
            for owner, limit in ((component_group[column], slack), (self._layer[column], room)):
                by_owner = owner.argsort(stable=True)
                running = flat_step[by_owner].cumsum(0)
                first = torch.searchsorted(owner[by_owner], torch.arange(limit.numel(), device=owner.device))
                before = torch.cat([running.new_zeros(1), running])[first][owner[by_owner]]
                fits[by_owner] &= running - before <= limit[owner[by_owner]]
            if not bool(fits.any()):
                break
            whole.view(-1)[order[fits]] += flat_step[fits]
        return whole.long()

    def _costs_of(self, whole: Tensor) -> Tensor:
        cost = multiply_adds(whole[0], whole[1])
        return cost.new_zeros(self.num_layers).index_add_(0, self._layer, cost)
