"""The best interval of each component, in one pass over its gains, compiled with numba."""

from __future__ import annotations

import torch
from torch import Tensor

from .compile_cache import compiled

__all__ = ["best_spans"]


@compiled("spans")
def _best(gains, cell_cost, cyclic):
    """First cell, number of cells and net gain of the interval of greatest net gain; no cells if none is positive."""
    count = len(gains)
    total = low = high = best = worst = 0.0
    low_at = high_at = start = cells = gap = gap_cells = 0
    for e in range(count):
        total += gains[e] - cell_cost
        if total - low > best:
            best, start, cells = total - low, low_at, e + 1 - low_at
        if total < low:
            low, low_at = total, e + 1
        if total - high < worst:
            worst, gap, gap_cells = total - high, high_at, e + 1 - high_at
        if total > high:
            high, high_at = total, e + 1
    if cyclic and total - worst > best:  # the complement of the interval of least gain
        return (gap + gap_cells) % count, count - gap_cells, total - worst
    return start, cells, best


@compiled("spans", keep=True)
def _best_of_each(gains, cell_cost, cyclic, start, cells, net):
    for k in range(len(gains)):
        start[k], cells[k], net[k] = _best(gains[k], cell_cost, cyclic)


def best_spans(gains: Tensor, cell_cost: float, cyclic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gblr_plugin.decomposition.spans.best_spans`.

    Args:
        gains: (K, cells) float32 or float64 on the CPU.
        cell_cost: Cost of one cell, which is subtracted from its gain.
        cyclic: Whether intervals may wrap around.

    Returns:
        Number of cells (K,) int64, first cell (K,) int64, net gain (K,) of the dtype of the gains.
    """
    start, cells = gains.new_empty(2, len(gains), dtype=torch.int64)
    net = gains.new_empty(len(gains))
    _best_of_each(gains.contiguous().numpy(), cell_cost, cyclic, start.numpy(), cells.numpy(), net.numpy())
    return cells, start, net
