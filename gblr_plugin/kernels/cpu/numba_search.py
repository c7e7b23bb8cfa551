"""Power iterations on the tiles of a matrix, and choice of candidates that overlap little, compiled with numba."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .compile_cache import compiled

__all__ = ["apart", "tile_vectors"]


@compiled("search", fast=True)
def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


@compiled("search", fast=True)
def _add(row, c, other):
    for i in range(len(row)):
        row[i] += c * other[i]


@compiled("search", keep=True, fast=True)
def _tile_vectors(matrix, height, width, down, across, steps, least, vectors, energy):
    per_row = (matrix.shape[1] - width) // across + 1
    u = np.empty(height, matrix.dtype)
    for index in range(len(vectors)):
        top, left = index // per_row * down, index % per_row * across
        v = vectors[index]
        for i in range(height):
            row = matrix[top + i, left : left + width]
            u[i] = _dot(row, row)
        v[:] = matrix[top + np.argmax(u), left : left + width]
        for _ in range(steps):
            for i in range(height):
                u[i] = _dot(matrix[top + i, left : left + width], v)
            size = max(np.sqrt(_dot(u, u)), least)
            v[:] = 0
            for i in range(height):
                _add(v, u[i] / size, matrix[top + i, left : left + width])
        energy[index] = _dot(v, v)


def tile_vectors(
    matrix: Tensor, height: int, width: int, down: int, across: int, steps: int, least: float
) -> tuple[Tensor, Tensor]:
    """Leading right vectors of overlapping tiles, times their singular values.

    Args:
        matrix: (m, n) on the CPU.
        height: Rows of a tile.
        width: Columns of a tile.
        down: Rows from tile to tile.
        across: Columns from tile to tile.
        steps: Power iterations, from the row of greatest norm.
        least: Norms below this count as this.

    Returns:
        (T, width) vectors and (T,) squared singular values, tiles of one row of tiles after each other.
    """
    count = ((matrix.shape[0] - height) // down + 1) * ((matrix.shape[1] - width) // across + 1)
    vectors, energy = matrix.new_empty(count, width), matrix.new_empty(count)
    data = matrix.contiguous().numpy()
    _tile_vectors(data, height, width, down, across, steps, least, vectors.numpy(), energy.numpy())
    return vectors, energy


@compiled("search")
def _shared(start, width, other_start, other_width, length):
    """Indices that two cyclic intervals share."""
    shift = (other_start - start) % length
    ahead = max(0, min(width, shift + other_width) - shift)
    return ahead + max(0, min(width, shift + other_width - length))


@compiled("search", keep=True)
def _apart(starts, widths, lengths, overlap, kept):
    count = 0
    for k in range(starts.shape[1]):
        area = widths[0, k] * widths[1, k]
        yields = False
        for place in range(count):
            j = kept[place]
            shared = _shared(starts[0, k], widths[0, k], starts[0, j], widths[0, j], lengths[0])
            if shared:
                shared *= _shared(starts[1, k], widths[1, k], starts[1, j], widths[1, j], lengths[1])
                if shared > overlap * min(area, widths[0, j] * widths[1, j]):
                    yields = True
                    break
        if not yields:
            kept[count] = k
            count += 1
            if count == len(kept):
                break
    return count


def apart(starts: Tensor, widths: Tensor, lengths: tuple[int, int], overlap: float, count: int) -> Tensor:
    """The first candidates, best first, that overlap little with every better one.

    Args:
        starts: (2, K) int64 first rows and first columns.
        widths: (2, K) int64.
        lengths: Rows and columns of the matrix, on which intervals wrap.
        overlap: Largest share of the smaller of two candidates that may lie in the other.
        count: Largest number kept.

    Returns:
        Their positions, int64.
    """
    kept = starts.new_empty(min(count, starts.shape[1]))
    arrays = [tensor.contiguous().numpy() for tensor in (starts, widths)]
    return kept[: _apart(*arrays, np.array(lengths), overlap, kept.numpy())] if len(kept) else kept
