"""Chooses where full-width intervals begin, so that they lose the smallest entries first when training shrinks them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..matrix.structure import Intervals, StructuredMatrix

__all__ = ["anchored"]


def _best_start(factor: Tensor, tile: int) -> Tensor:
    """(K,) start, a multiple of ``tile``, from which a cyclic interval loses least energy as its end is cut back.

    A shrinking interval keeps its start. Of the widths 1 .. N, those up to i exclude the i-th index after the start. So
    the best start minimises the sum of i * energy_i, which is a circular correlation.
    """
    n = factor.shape[1]
    energy = factor.double().square()
    ramp = torch.arange(n, dtype=torch.float64, device=factor.device)
    loss = torch.fft.irfft(torch.fft.rfft(energy) * torch.fft.rfft(ramp).conj(), n=n)
    start: Tensor = loss[:, ::tile].argmin(1) * tile
    return start


def anchored(matrix: StructuredMatrix, tiles: tuple[int, int] = (1, 1)) -> StructuredMatrix:
    """The same matrix, with the starts of its full-width intervals chosen by the energy of their factors.

    A full interval covers the axis wherever it starts, so its start may be chosen. With all starts at zero, as in the
    paper, every interval shrinks towards the first rows and columns, and all components end in the same corner.

    Args:
        matrix: Any structured matrix; intervals that are not full stay.
        tiles: Multiples of rows and of columns at which intervals may start.
    """

    def moved(intervals: Intervals, factor: Tensor, tile: int) -> Intervals:
        full = intervals.width == intervals.length
        start = torch.where(full, _best_start(factor, tile), intervals.start)
        return Intervals.of_known(intervals.width, start, intervals.length)

    rows = moved(matrix.rows, matrix.u, tiles[0])
    cols = moved(matrix.cols, matrix.v, tiles[1])
    return StructuredMatrix(matrix.u, matrix.v, rows, cols, matrix.split_sizes)
