"""Finds the lambda at which the widths of layers meet a budget of relative FLOPs.

To minimise the loss under a bound on the widths' l1 norm is proximal gradient descent: after each gradient step the
widths are soft-thresholded by lambda times their learning rate, lambda being the bound's multiplier. The published
method finds lambda by a grid search over trainings. This module finds it at each step: the lambda at which the
multiply-adds, counted after the shrinkage, are at most the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..matrix.gaudi_mask import integer_widths
from ..matrix.structure import multiply_adds

__all__ = ["AxisSpec", "WidthBudget"]

_CANDIDATES = 8  # thresholds that are evaluated at once
_ROUNDS = 7  # after these rounds the gap between candidates is below the resolution
_RESOLUTION = 2e-6  # resolution of thresholds, as a fraction of the axis
_SLOWEST = 1e-3  # a layer at a lower share of the group's largest rate may not be emptied


@dataclass(frozen=True)
class AxisSpec:
    """What is needed to count a layer's multiply-adds from its normalised widths.

    Args:
        axis_lengths: Rows (per row split) and columns that a normalised width of 1 covers.
        tile: Multiples of rows and of columns at which intervals begin and end.
        num_components: K, over all splits.
        dense: Multiply-adds of the dense product, m * n.
    """

    axis_lengths: tuple[int, int]
    tile: tuple[int, int]
    num_components: int
    dense: int


class WidthBudget:
    """Finds each layer's threshold by counting multiply-adds, so that groups of layers meet their targets.

    Args:
        specs: One per layer.
        groups: (L,) group of each layer, 0 .. G - 1; layers of a group share one target.
        lower: Least multiply-adds of each layer within its group (``max_sparse_ratio``); default 0.
        upper: Most multiply-adds of each layer within its group (``min_sparse_ratio``); default none.
        device: Device of the widths.

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
        self._groups = list(groups)
        self.num_groups = max(groups) + 1
        self.device = torch.device("cpu" if device is None else device)
        counts = torch.tensor([spec.num_components for spec in specs])
        layer = torch.arange(self.num_layers).repeat_interleave(counts)

        def per_component(values: list[tuple[int, int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).T[:, layer].to(device)

        self.num_components = int(counts.sum())
        self._layer = layer.to(device)
        self._bounds = F.pad(counts.cumsum(0), (1, 0)).to(device)
        self._untiled = all(spec.tile == (1, 1) for spec in specs)
        self._length = per_component([spec.axis_lengths for spec in specs])
        self._tile = per_component([spec.tile for spec in specs])
        self._group = torch.tensor(self._groups, dtype=torch.int64).to(device)
        low = [0.0] * self.num_layers if lower is None else list(lower)
        high = [math.inf] * self.num_layers if upper is None else list(upper)
        for index, (a, b) in enumerate(zip(low, high, strict=True)):
            if a > b:
                raise ConfigError(f"budget: layer {index} must cost at least {a:g} and at most {b:g} multiply-adds")
        self._lower = torch.tensor(low, dtype=torch.float64).to(device)
        self._upper = torch.tensor(high, dtype=torch.float64).to(device)
        self._bounded = any(a > 0 for a in low) or any(b < math.inf for b in high)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self._upper)

    def snap(self, widths: Tensor) -> Tensor:
        """Integer widths ((..., 2, C) int64) of normalised widths, as the masks round them."""
        return integer_widths(widths, self._length, self._tile)

    def layer_cost(self, widths: Tensor) -> Tensor:
        """Multiply-adds per layer, (..., L) int64, of normalised widths (..., 2, C) in [0, 1]."""
        return self._layer_cost(widths).long()

    def _layer_cost(self, widths: Tensor) -> Tensor:
        # Single widths are integers below 2^24, exact in the dtype of the widths; their sums need float64.
        tiled = not self._untiled
        samples = self.snap(widths).to(widths) if tiled else torch.round(widths * self._length.to(widths.dtype))
        rows, cols = samples.unbind(-2)
        running = (rows + cols).mul_(torch.minimum(rows, cols) > 0).cumsum(-1, dtype=torch.float64)
        return F.pad(running, (1, 0)).index_select(-1, self._bounds).diff()

    def _shrunk_cost(self, widths: Tensor, threshold: Tensor, growing: bool) -> Tensor:
        """(W, L) cost after shrinking by thresholds (W, L); a negative threshold grows live widths only."""
        step = threshold.to(widths.dtype)[:, None, self._layer]
        if growing:
            step = torch.where((step < 0) & (widths <= 0), 0, step)
        return self._layer_cost((widths - step).clamp_(0, 1))

    def _search(
        self,
        widths: Tensor,
        target: Tensor,
        group: Tensor,
        span: tuple[Tensor, Tensor],
        growing: bool,
        shares: Tensor | None = None,
        clamp: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(G,) smallest threshold in ``span`` at which each group's cost is at most its target.

        Each layer shrinks by its share of the group's threshold, limited to the range that ``clamp`` gives it.
        """
        num = target.numel()
        low, high = span
        even = torch.arange(_CANDIDATES + 1, dtype=target.dtype, device=target.device)[:, None] / _CANDIDATES
        for turn in range(_ROUNDS):
            fraction = even if turn else even**4  # a single step mostly shrinks little: candidates are dense near 0
            candidates = low + (high - low) * fraction  # (W + 1, G)
            threshold = candidates[:, group] if shares is None else candidates[:, group] * shares
            if clamp is not None:
                threshold = threshold.maximum(clamp[0]).minimum(clamp[1])
            cost = self._shrunk_cost(widths, threshold, growing)
            total = cost.new_zeros(_CANDIDATES + 1, num).index_add_(1, group, cost)
            fits = (total <= target).int().cummax(0).values  # rounded counts may rise and fall: take the first fit
            first = (_CANDIDATES + 1 - fits.sum(0)).clamp(max=_CANDIDATES)
            high = candidates.gather(0, first[None])[0]
            low = candidates.gather(0, (first - 1).clamp(min=0)[None])[0]
            if not widths.is_cuda and bool((high - low).max() <= _RESOLUTION):  # waiting for a GPU outlasts a round
                break
        return high

    def _paces(self, rates: list[float]) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Least and largest threshold of each group's fastest layer, and every layer's share (``None``: all 1)."""
        fastest, most = [0.0] * self.num_groups, [1.0] * self.num_groups
        for rate, group in zip(rates, self._groups, strict=True):
            fastest[group] = max(fastest[group], rate)
        shares = []
        for rate, group in zip(rates, self._groups, strict=True):
            share = rate / fastest[group] if fastest[group] else 1.0
            shares.append(share)
            if share > 0:  # a layer at half the rate is emptied by a group threshold that is twice as large
                most[group] = max(most[group], 1 / max(share, _SLOWEST))
        span = -self._tensor(fastest), self._tensor(most)
        return span, None if min(shares) == 1.0 else self._tensor(shares)

    @torch.no_grad()
    def thresholds(
        self,
        widths: Tensor,
        targets: Tensor,
        rates: Sequence[float] | None = None,
        upper: Sequence[float] | None = None,
    ) -> Tensor:
        """Thresholds for :func:`~gblr_plugin.learning.proximal.prox_and_clip_`.

        Args:
            widths: (2, C) normalised widths of all layers side by side, after the gradient step.
            targets: (G,) multiply-adds per group; ``inf`` leaves a group alone.
            rates: (L,) learning rates. The thresholds of a group are one lambda times its layers' rates. In a group
                below its target the live widths grow by at most these rates, as fractions of the axis. If all rates of
                a group are 0, as by default, its layers have equal thresholds and nothing grows.
            upper: Most multiply-adds of each layer at this step, in place of the constructor's ``upper``.

        Returns:
            (L,) float64. After the shrinkage no group exceeds its target, unless its lower bounds do, or its layers
            with learning rates far below the group's largest.
        """
        targets = targets.to(self._upper)
        paces = [0.0] * self.num_layers if rates is None else list(rates)
        span, shares = self._paces(paces)
        growing, clamp = any(paces), None
        if self._bounded:
            most = self._upper if upper is None else self._tensor(upper)
            each = torch.arange(self.num_layers, device=widths.device)
            alone = -self._tensor(paces), torch.ones_like(most)
            least = self._search(widths, most, each, alone, growing)
            # At this threshold the cost is just below the lower bound: lower it by the resolution of the search.
            last = self._search(widths, self._lower, each, alone, growing) - 2 * _RESOLUTION
            last = torch.where(self._lower > 0, last, torch.ones_like(last))
            clamp = least, torch.maximum(last, least)
        threshold = self._search(widths, targets, self._group, span, growing, shares, clamp)[self._group]
        if shares is not None:
            threshold = threshold * shares
        if clamp is not None:
            threshold = threshold.maximum(clamp[0]).minimum(clamp[1])
        return torch.where(targets.isinf()[self._group], torch.zeros_like(threshold), threshold)

    @torch.no_grad()
    def rounded(self, widths: Tensor, targets: Tensor) -> Tensor:
        """Integer widths that leave less of each group's target unused than one interval needs to grow by a tile.

        First, components that rounding made empty get one tile again, if the target allows it. Then live widths grow
        by tiles, beginning with those from which rounding took most. A width of exactly zero stays zero.

        Args:
            widths: (2, C) normalised widths that already meet the targets.
            targets: (G,) multiply-adds per group; ``inf`` only rounds.

        Returns:
            (2, C) int64 widths.
        """
        samples = self.snap(widths).to(torch.float64)
        targets = targets.to(self._upper)
        while self._revive(samples, widths.to(torch.float64), targets):
            pass
        while self._raise(samples, widths.to(torch.float64), targets):
            pass
        return samples.long()

    def _slack(self, samples: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Unused multiply-adds: (G,) of each group's target, and (L,) of each layer's upper bound."""
        cost = multiply_adds(samples[0], samples[1])
        cost = cost.new_zeros(self.num_layers).index_add_(0, self._layer, cost)
        return targets - cost.new_zeros(self.num_groups).index_add_(0, self._group, cost), self._upper - cost

    def _affordable(
        self, score: Tensor, cost: Tensor, column: Tensor, usable: Tensor, slack: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Indices of usable items whose cost, together with all items of higher score, fits their group and layer."""
        owners = self._group[self._layer][column], self._layer[column]
        for owner, left in zip(owners, slack, strict=True):
            usable = usable & (cost <= left[owner])
        usable = usable & torch.isfinite(slack[0])[owners[0]]
        order = torch.where(usable, score, -torch.inf).argsort(descending=True, stable=True)
        order = order[usable[order]]
        fits = torch.ones_like(order, dtype=torch.bool)
        for owner, left in zip(owners, slack, strict=True):
            by_owner = owner[order].argsort(stable=True)
            sorted_owner = owner[order][by_owner]
            running = torch.cat([cost.new_zeros(1), cost[order][by_owner].cumsum(0)])
            first = torch.searchsorted(sorted_owner, torch.arange(left.numel(), device=order.device))
            fits[by_owner] &= running[1:] - running[first][sorted_owner] <= left[sorted_owner]
        return order[fits]

    def _revive(self, samples: Tensor, widths: Tensor, targets: Tensor) -> bool:
        """Set empty widths of components that rounding made empty to one tile, in place; return whether any was set."""
        empty = samples == 0
        first = torch.where(empty, torch.minimum(self._tile, self._length), samples)
        score = torch.where(empty, widths, torch.inf).amin(0)
        column = torch.arange(samples.shape[1], device=samples.device)
        usable = empty.any(0) & (score > 0)
        chosen = self._affordable(score, first.sum(0), column, usable, self._slack(samples, targets))
        samples[:, chosen] = first[:, chosen]
        return chosen.numel() > 0

    def _raise(self, samples: Tensor, widths: Tensor, targets: Tensor) -> bool:
        """Raise live widths by one tile each, in place, within the slack; return whether any was raised."""
        step = torch.minimum(self._tile, self._length - samples)
        usable = (samples > 0).all(0) & (step > 0)
        lost = widths - samples / self._length
        column = torch.arange(samples.shape[1], device=samples.device).repeat(2)
        chosen = self._affordable(
            lost.flatten(), step.flatten(), column, usable.flatten(), self._slack(samples, targets)
        )
        samples.view(-1)[chosen] += step.flatten()[chosen]
        return chosen.numel() > 0
