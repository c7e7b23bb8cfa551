"""Choose where full-width intervals begin, so that shrinking takes the least first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..matrix.structure import Intervals, StructuredMatrix

__all__ = ["anchored"]


def _best_start(factor: Tensor, tile: int) -> Tensor:
    """(K,) start, on a multiple of ``tile``, whose cyclic interval loses least energy as its end is cut back.

    A shrinking interval keeps its start. Index i after the start is outside it at i of the N widths, so minimise the
    sum of i * energy over the starts: a circular correlation.
    """
    n = factor.shape[1]
    energy = factor.double().square()
    ramp = torch.arange(n, dtype=torch.float64, device=factor.device)
    loss = torch.fft.irfft(torch.fft.rfft(energy) * torch.fft.rfft(ramp).conj(), n=n)
    start: Tensor = loss[:, ::tile].argmin(1) * tile
    return start


def anchored(matrix: StructuredMatrix, tiles: tuple[int, int] = (1, 1)) -> StructuredMatrix:
    """The same matrix, the starts of its full-width intervals chosen by their factors' energy.

    A full interval covers the axis wherever it starts, so the choice is free; with all starts at zero, as published,
    every interval shrinks towards the first rows and columns, and all components end in the same corner.

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
