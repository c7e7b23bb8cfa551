"""Many small least-squares problems on submatrices of one Gram matrix, compiled with numba. Optional.

Each problem gathers its submatrix into a buffer that stays in the cache, factors it there and solves; batched torch
operations hold all submatrices at once, and compute whole inverses where only their diagonals are wanted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compile_cache import compiled
from .threads import run_parts

__all__ = ["solve"]


@compiled("solve", fast=True)
def _subtract(row, c, other):
    """Take ``c * other`` from a row; a function, so that the compiler sees two vectors of one length."""
    for i in range(len(row)):
        row[i] -= c * other[i]


@compiled("solve", fast=True)
def _subtract_four(row, c0, c1, c2, c3, r0, r1, r2, r3):
    for i in range(len(row)):
        row[i] -= c0 * r0[i] + c1 * r1[i] + c2 * r2[i] + c3 * r3[i]


@compiled("solve", fast=True)
def _scale(row, c):
    for i in range(len(row)):
        row[i] *= c


@compiled("solve", fast=True)
def _factor(upper, rhs, size, tiny):
    """In place: the upper Cholesky factor U of the symmetric matrix whose upper triangle is given, and U^-T rhs.

    Four rows at a time, whose part in the rows below is taken away in one pass.
    """
    one = tiny / tiny
    for first in range(0, size, 4):
        last = min(first + 4, size)
        for p in range(first, last):
            row = upper[p, p:size]
            scale = one / np.sqrt(max(row[0], tiny))
            _scale(row, scale)
            for q in range(p + 1, last):
                _subtract(upper[q, q:size], row[q - p], row[q - p :])
            y = rhs[p] * scale
            rhs[p] = y
            _subtract(rhs[p + 1 : size], y, row[1:])
        if last == first + 4:
            r0, r1, r2, r3 = upper[first], upper[first + 1], upper[first + 2], upper[first + 3]
            for i in range(last, size):
                row = upper[i, i:size]
                _subtract_four(row, r0[i], r1[i], r2[i], r3[i], r0[i:], r1[i:], r2[i:], r3[i:])


@compiled("solve", fast=True)
def _invert(upper, inverse, size, one):
    """The upper triangular inverse of U, from the last row up, four rows of it at a time."""
    for i in range(size - 1, -1, -1):
        row, c = inverse[i], upper[i]
        row[max(0, i - 3) : size] = one - one  # what lies before the diagonal is read as zeros
        row[i] = one
        j = i + 1
        while j < size and (size - j) % 4:
            _subtract(row[j:size], c[j], inverse[j, j:size])
            j += 1
        while j < size:
            r0, r1, r2, r3 = inverse[j, j:], inverse[j + 1, j:], inverse[j + 2, j:], inverse[j + 3, j:]
            _subtract_four(row[j:size], c[j], c[j + 1], c[j + 2], c[j + 3], r0, r1, r2, r3)
            j += 4
        _scale(row[i:size], one / c[i])


@compiled("solve", fast=True)
def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


@compiled("solve", keep=True, fast=True)
def _solve(gram, right, offsets, members, tiny, upper, inverse, rhs, solution, gains):
    """Problem j has the components ``members[offsets[j] : offsets[j + 1]]``; ``gains`` without rows are not wanted."""
    for j in range(len(offsets) - 1):
        mine = members[offsets[j] : offsets[j + 1]]
        size = len(mine)
        for a in range(size):
            row, into, others = gram[mine[a]], upper[a, a:size], mine[a:]
            for b in range(len(into)):
                into[b] = row[others[b]]
            rhs[a] = right[mine[a], j]
        _factor(upper, rhs, size, tiny)
        if gains.shape[0] == 0:
            for a in range(size - 1, -1, -1):
                rhs[a] /= upper[a, a]
                if a + 1 < size:
                    rhs[a] -= _dot(upper[a, a + 1 : size], rhs[a + 1 : size]) / upper[a, a]
                solution[mine[a], j] = rhs[a]
            continue
        _invert(upper, inverse, size, tiny / tiny)
        for a in range(size):
            row = inverse[a, a:size]
            found = _dot(row, rhs[a:size])
            solution[mine[a], j] = found
            gains[mine[a], j] = found * found / _dot(row, row)


def solve(gram: Tensor, right: Tensor, support: Tensor, want_gains: bool) -> tuple[Tensor, Tensor | None]:
    """As :func:`gblr_plugin.decomposition.joint.supported_solve`.

    Args:
        gram: (K, K) symmetric positive definite, float32 or float64 on the CPU.
        right: (K, N) of the same dtype.
        support: (K, N) bool.
        want_gains: Also return the joint gains.

    Returns:
        The solution (K, N), and the gains (K, N) or ``None``.
    """
    counts = support.sum(0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).numpy()
    members = support.T.nonzero()[:, 1].contiguous().numpy()
    solution = torch.zeros_like(right, memory_format=torch.contiguous_format)
    gains = torch.zeros_like(solution) if want_gains else solution.new_zeros(0, right.shape[1])
    most, length = int(counts.max()), right.shape[1]
    tiny = (torch.finfo(gram.dtype).eps * gram.diagonal().mean()).numpy()[()]
    matrix, known, found, worth = (part.contiguous().numpy() for part in (gram, right, solution, gains))

    def part(begin: int, end: int) -> None:
        buffers = [np.empty(shape, matrix.dtype) for shape in ((most, most), (most, most), most)]
        inside = slice(begin, end)
        bounds = offsets[begin : end + 1]
        _solve(matrix, known[:, inside], bounds, members, tiny, *buffers, found[:, inside], worth[:, inside])

    share = -(-length // torch.get_num_threads())
    run_parts(lambda begin: part(begin, min(begin + share, length)), range(0, length, share))
    return solution, gains if want_gains else None
