"""The best interval of each component, in one pass over its gains, compiled with numba."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compile_cache import compiled

__all__ = ["best_spans", "joint_gains", "supports"]


@compiled("spans")
def _best(gains, price, cyclic):
    """First cell, number of cells and net gain of the interval of greatest net gain; no cells if none is positive."""
    count = len(gains)
    total = low = high = best = worst = 0.0
    low_at = high_at = start = cells = gap = gap_cells = 0
    for e in range(count):
        total += gains[e] - price
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
def _best_of_each(gains, price, cyclic, start, cells, net):
    for k in range(len(gains)):
        start[k], cells[k], net[k] = _best(gains[k], price, cyclic)


def best_spans(gains: Tensor, price: float, cyclic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gblr_plugin.decomposition.spans.best_spans`.

    Args:
        gains: (K, cells) float32 or float64 on the CPU.
        price: Cost of one cell, which is subtracted from its gain.
        cyclic: Whether intervals may wrap around.

    Returns:
        Number of cells (K,) int64, first cell (K,) int64, net gain (K,) of the dtype of the gains.
    """
    start, cells = gains.new_empty(2, len(gains), dtype=torch.int64)
    net = gains.new_empty(len(gains))
    _best_of_each(gains.contiguous().numpy(), price, cyclic, start.numpy(), cells.numpy(), net.numpy())
    return cells, start, net


@compiled("spans", fast=True)
def _chosen(inside, right, image, support, scale, into):
    for i in range(len(into)):
        slope = right[i] - image[i]
        into[i] = inside[i] if support[i] else slope * slope * scale


@compiled("spans", keep=True)
def _joint_gains(inside, right, image, support, scale, tile, line, sums):
    for k in range(len(inside)):
        if tile == 1:
            _chosen(inside[k], right[k], image[k], support[k], scale[k], sums[k])
            continue
        _chosen(inside[k], right[k], image[k], support[k], scale[k], line)
        for cell in range(sums.shape[1]):
            sums[k, cell] = line[cell * tile : (cell + 1) * tile].sum()


def joint_gains(inside: Tensor, right: Tensor, image: Tensor, support: Tensor, scale: Tensor, tile: int) -> Tensor:
    """Gains inside supports, ``(right - image)^2 scale`` outside, summed over the cells of the axis.

    Args:
        inside: (K, N).
        right: (K, N).
        image: (K, N).
        support: (K, N) bool.
        scale: (K,).
        tile: Indices of a cell; the last cell may be short.

    Returns:
        (K, cells).
    """
    sums = inside.new_empty(len(inside), -(-inside.shape[1] // tile))
    arrays = [tensor.contiguous().numpy() for tensor in (inside, right, image, support, scale)]
    _joint_gains(*arrays, tile, np.empty(inside.shape[1], arrays[0].dtype), sums.numpy())
    return sums


@compiled("spans", keep=True)
def _supports(start, width, into):
    length = into.shape[1]
    for k in range(len(into)):
        end = start[k] + width[k]
        into[k, start[k] : min(end, length)] = True
        into[k, : max(0, end - length)] = True


def supports(start: Tensor, width: Tensor, length: int) -> Tensor:
    """(K, length) bool indicator of cyclic intervals, (K,) int64 each."""
    into = torch.zeros(len(start), length, dtype=torch.bool)
    _supports(start.contiguous().numpy(), width.contiguous().numpy(), into.numpy())
    return into
