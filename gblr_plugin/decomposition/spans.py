"""Intervals counted in grid cells, and the best interval for given gains (Kadane's algorithm, batched)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.optional import span_kernel
from ..matrix.structure import Intervals
from ..matrix.tiles import TiledAxis

__all__ = ["Spans", "best_spans", "cell_sums", "joint_gains", "longest_run"]


@dataclass(frozen=True, eq=False)
class Spans:
    """K intervals of an axis in units of grid cells.

    Args:
        cells: (K,) int64 number of cells covered.
        start: (K,) int64 first cell.
        grid: The axis.
    """

    cells: Tensor
    start: Tensor
    grid: TiledAxis

    @classmethod
    def none(cls, grid: TiledAxis, device: torch.device) -> Spans:
        """No intervals at all."""
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(empty, empty, grid)

    def intervals(self) -> Intervals:
        """The same intervals, counted in indices."""
        return self.grid.intervals(self.cells, self.start)

    def support(self) -> Tensor:
        """(K, length) bool indicator of the covered indices."""
        return self.intervals().support()

    def widths(self) -> Tensor:
        """(K,) int64 indices covered, which is what the interval costs."""
        return self.grid.widths(self.cells)

    def select(self, index: Tensor) -> Spans:
        """The intervals at ``index``."""
        return Spans(self.cells[index], self.start[index], self.grid)

    def join(self, other: Spans) -> Spans:
        """These intervals, then those of ``other``."""
        return Spans(torch.cat([self.cells, other.cells]), torch.cat([self.start, other.start]), self.grid)


def cell_sums(values: Tensor, grid: TiledAxis) -> Tensor:
    """Sums of (K, length) values over the cells of the axis: (K, cells)."""
    if grid.tile == 1:
        return values
    padded = F.pad(values, (0, grid.cells * grid.tile - grid.length))
    sums: Tensor = padded.unflatten(1, (grid.cells, grid.tile)).sum(2)
    return sums


def joint_gains(
    inside: Tensor, right: Tensor, image: Tensor, support: Tensor, scale: Tensor, grid: TiledAxis
) -> Tensor:
    """Gain of covering each cell with each component, summed over the indices of the cell.

    A covered index gains by how much the error would grow without it; an index that is not covered gains by how much
    the error would fall if the component alone were fitted to the residual there.

    Args:
        inside: (K, length) gains of the covered indices.
        right: (K, length) products of the fixed factors with the target.
        image: (K, length) products of the fixed factors with the present fit.
        support: (K, length) bool, which indices are covered.
        scale: (K,) one over the squared norms of the fixed factors.
        grid: The axis.

    Returns:
        (K, cells).
    """
    return cell_sums(torch.where(support, inside, (right - image).square() * scale[:, None]), grid)


def best_spans(gains: Tensor, grid: TiledAxis, min_gain: float) -> tuple[Spans, Tensor]:
    """The interval of each component whose gains exceed the least gain of its indices by most.

    Kadane's maximum-sum subarray by running minima of prefix sums; an interval that wraps is the complement of the
    minimum-sum subarray.

    Args:
        gains: (K, cells) non-negative gain of covering each cell.
        grid: The axis.
        min_gain: Least gain of one index.

    Returns:
        The intervals (of 0 cells where none does) and their (K,) net gains.
    """
    kernel = span_kernel(gains)
    if kernel is not None:
        cells, start, net = kernel(gains, min_gain * grid.tile, grid.cyclic)
        return Spans(cells, start, grid), net
    count = gains.shape[1]
    prefix = F.pad((gains - min_gain * grid.tile).cumsum(1), (1, 0))
    low, low_at = prefix[:, :-1].cummin(1)
    best, end = (prefix[:, 1:] - low).max(1)
    start = low_at.gather(1, end[:, None])[:, 0]
    cells = end - start + 1
    if grid.cyclic:
        high, high_at = prefix[:, :-1].cummax(1)
        worst, gap_end = (prefix[:, 1:] - high).min(1)
        wrapped = prefix[:, -1] - worst
        gap_start = high_at.gather(1, gap_end[:, None])[:, 0]
        wraps = wrapped > best
        best = torch.where(wraps, wrapped, best)
        start = torch.where(wraps, (gap_end + 1) % count, start)
        cells = torch.where(wraps, count - (gap_end - gap_start + 1), cells)
    gains_more = best > 0
    zero = torch.zeros_like(cells)
    return Spans(torch.where(gains_more, cells, zero), torch.where(gains_more, start, zero), grid), best.clamp(min=0)


def longest_run(active: Tensor) -> tuple[Tensor, Tensor]:
    """Longest cyclic run of True in each row of a (K, N) bool tensor: ((K,) widths, (K,) starts), int64."""
    n = active.shape[1]
    twice = torch.cat([active, active], 1)
    index = torch.arange(2 * n, device=active.device).expand_as(twice)
    last_gap = torch.where(twice, torch.full_like(index, -1), index).cummax(1).values
    width, end = (index - last_gap).clamp(max=n).max(1)
    return width, (end - width + 1) % n
