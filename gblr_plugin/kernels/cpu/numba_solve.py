"""Many least-squares problems on submatrices of one Gram matrix, compiled with numba.

Neighbouring indices of an axis meet nearly the same components, since these cover intervals: K intervals begin and end
2K times on an axis, once or twice per index. So the inverse of the submatrix of size s is kept from index to index, and
a component that begins or ends is added to it or removed from it, in s^2 operations each, where a new factorisation
takes s^3. The diagonal of the inverse gives the gains. Adding and removing lose digits if a component is nearly a
combination of the others; the problems of that index and of the next are then factored anew.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compile_cache import compiled
from .threads import run_shares

__all__ = ["solve"]

SEGMENT = 96, 192
"""Least and greatest number of indices between two new factorisations; a quarter of the axis in between."""

REFINEMENTS = 4
DEPENDENT = 1e6
"""Factor by which a component's dependence on the others raises its diagonal of the inverse, from which on the inverse
is not carried to the next index."""

ENOUGH = 1e-9
"""Change by a refinement, relative to the largest unknown, after which there is no other."""


@compiled("solve", fast=True)
def _add(row, c, other):
    """Add ``c * other`` to a row; a function, so that the compiler sees two vectors of one length."""
    for i in range(len(row)):
        row[i] += c * other[i]


@compiled("solve", fast=True)
def _largest(row):
    largest = 0.0
    for i in range(len(row)):
        largest = max(largest, abs(row[i]))
    return largest


@compiled("solve", fast=True)
def _dot_and_add(row, x, c, y):
    """``row @ x``, and ``c * row`` added to y, in one pass."""
    total = c * 0
    for i in range(len(row)):
        total += row[i] * x[i]
        y[i] += c * row[i]
    return total


@compiled("solve", fast=True)
def _four_dots_and_add(row0, row1, row2, row3, x, c0, c1, c2, c3, y):
    total0 = total1 = total2 = total3 = c0 * 0
    for i in range(len(row0)):
        total0 += row0[i] * x[i]
        total1 += row1[i] * x[i]
        total2 += row2[i] * x[i]
        total3 += row3[i] * x[i]
        y[i] += c0 * row0[i] + c1 * row1[i] + c2 * row2[i] + c3 * row3[i]
    return total0, total1, total2, total3


@compiled("solve", fast=True)
def _product(lower, x, y, size):
    """Write A x to y, for a symmetric A whose lower triangle is given; four rows at a time."""
    fours = size - size % 4
    for a in range(0, fours, 4):
        y[a], y[a + 1], y[a + 2], y[a + 3] = _four_dots_and_add(
            lower[a, :a],
            lower[a + 1, :a],
            lower[a + 2, :a],
            lower[a + 3, :a],
            x[:a],
            x[a],
            x[a + 1],
            x[a + 2],
            x[a + 3],
            y[:a],
        )
        for b in range(a, a + 4):
            y[b] += lower[b, b] * x[b]
            for c in range(a, b):
                y[b] += lower[b, c] * x[c]
                y[c] += lower[b, c] * x[b]
    for a in range(fours, size):
        y[a] = lower[a, a] * x[a]
        y[a] += _dot_and_add(lower[a, :a], x[:a], x[a], y[:a])


@compiled("solve", fast=True)
def _take_out(matrix, slot, last):
    """Move the last row and column of a symmetric matrix, of which the lower triangle is kept, to ``slot``."""
    for b in range(slot):
        matrix[slot, b] = matrix[last, b]
    for a in range(slot + 1, last):
        matrix[a, slot] = matrix[last, a]
    matrix[slot, slot] = matrix[last, last]


@compiled("solve", fast=True)
def _leave(slot, size, inverse, known, who, column):
    """Remove the component in a slot, whose place the last one takes; returns how many are left."""
    last = size - 1
    for b in range(slot):
        column[b] = inverse[slot, b]
    for a in range(slot, size):
        column[a] = inverse[a, slot]
    pivot = column[slot]
    _take_out(inverse, slot, last)
    _take_out(known, slot, last)
    who[slot] = who[last]
    column[slot] = column[last]
    for a in range(last):
        _add(inverse[a, : a + 1], -column[a] / pivot, column[: a + 1])
    return last


@compiled("solve", fast=True)
def _join(k, size, gram, inverse, known, who, column, tiny):
    """Add component k after the others; returns how many there are."""
    row, into = gram[k], known[size]
    for b in range(size):
        into[b] = row[who[b]]
    into[size] = row[k]
    who[size] = k
    _product(inverse, into, column, size)
    rest = into[size]
    for b in range(size):
        rest -= into[b] * column[b]
    rest = max(rest, tiny)
    for a in range(size):
        _add(inverse[a, : a + 1], column[a] / rest, column[: a + 1])
    for b in range(size):
        inverse[size, b] = -column[b] / rest
    inverse[size, size] = 1 / rest
    return size + 1


@compiled("solve", fast=True)
def _dot(x, y):
    total = 0.0
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@compiled("solve", fast=True)
def _factored(size, known, inverse, spare, tiny):
    """The inverse by a Cholesky factorisation: L, then M = L^-1, then M^T M; lower triangles."""
    for a in range(size):
        for b in range(a):
            inverse[a, b] = (known[a, b] - _dot(inverse[a, :b], inverse[b, :b])) / inverse[b, b]
        inverse[a, a] = np.sqrt(max(known[a, a] - _dot(inverse[a, :a], inverse[a, :a]), tiny))
    for a in range(size):
        corner = 1 / inverse[a, a]
        spare[a, : a + 1] = 0
        spare[a, a] = corner
        for c in range(a):
            _add(spare[a, : c + 1], -corner * inverse[a, c], spare[c, : c + 1])
    for a in range(size):
        inverse[a, : a + 1] = 0
        for c in range(a + 1):
            _add(inverse[c, : c + 1], spare[a, c], spare[a, : c + 1])


@compiled("solve", fast=True)
def _dependence(size, known, inverse):
    """Largest factor by which dependence on the others raises a diagonal entry; infinite if this is no inverse."""
    largest = 1.0
    for a in range(size):
        factor = known[a, a] * inverse[a, a]
        if not factor >= 0.5:  # 1 at least but for rounding; also what is not a number
            return np.inf
        largest = max(largest, factor)
    return largest


@compiled("solve", keep=True, fast=True)
def _solve(gram, right, support, tiny, refinements, inverse, known, spare, who, vectors, solution, gains):
    """Problem j has the components of ``support[j]``; ``gains`` without rows are not wanted."""
    size, sound = 0, False  # whether the inverse may be carried on
    column, rhs, found, change = vectors
    before = np.zeros(len(gram), np.bool_)
    for j in range(len(support)):
        on = support[j]
        changes = 0
        for k in range(len(on)):
            changes += on[k] != before[k]
        if changes:
            members = 0
            for k in range(len(on)):
                members += on[k]
            if sound and 3 * changes <= members:
                for slot in range(size - 1, -1, -1):
                    if not on[who[slot]]:
                        size = _leave(slot, size, inverse, known, who, column)
                for k in range(len(on)):
                    if on[k] and not before[k]:
                        size = _join(k, size, gram, inverse, known, who, column, tiny)
                sound = _dependence(size, known, inverse) < DEPENDENT
            else:
                sound, size = False, 0
                for k in range(len(on)):
                    if on[k]:
                        who[size] = k
                        for b in range(size + 1):
                            known[size, b] = gram[k, who[b]]
                        size += 1
            if not sound:
                _factored(size, known, inverse, spare, tiny)
                sound = _dependence(size, known, inverse) < DEPENDENT
            before[:] = on
        for a in range(size):
            rhs[a] = right[who[a], j]
        _product(inverse, rhs, found, size)
        for _ in range(refinements):  # correct what rounding left in the inverse
            _product(known, found, column, size)
            for a in range(size):
                column[a] = rhs[a] - column[a]
            _product(inverse, column, change, size)
            _add(found[:size], 1.0, change[:size])
            if _largest(change[:size]) <= ENOUGH * _largest(found[:size]):
                break
        for a in range(size):
            solution[who[a], j] = found[a]
        if gains.shape[0]:
            for a in range(size):
                gains[who[a], j] = found[a] * found[a] / inverse[a, a]


@compiled("solve", keep=True)
def _turned(support, into):
    """The transpose of (K, N) flags; returns the largest number in a column."""
    count = np.zeros(support.shape[1], np.int64)
    for k in range(len(support)):
        row = support[k]
        for j in range(len(row)):
            into[j, k] = row[j]
            count[j] += row[j]
    return count.max()


def solve(gram: Tensor, right: Tensor, support: Tensor, want_gains: bool) -> tuple[Tensor, Tensor | None]:
    """As :func:`gblr_plugin.decomposition.joint.supported_solve`; the inverses are float64 in any case.

    Args:
        gram: (K, K) symmetric positive definite, float32 or float64 on the CPU.
        right: (K, N) of the same dtype.
        support: (K, N) bool.
        want_gains: Also return the joint gains.

    Returns:
        The solution (K, N), and the gains (K, N) or ``None``.
    """
    solution = torch.zeros_like(right, memory_format=torch.contiguous_format)
    gains = torch.zeros_like(solution) if want_gains else solution.new_zeros(0, right.shape[1])
    length = right.shape[1]
    on = np.empty((length, len(gram)), np.bool_)
    most = _turned(support.contiguous().numpy(), on)
    tiny = float(torch.finfo(gram.dtype).eps * gram.diagonal().mean())
    matrix, known, found, gained = (tensor.contiguous().numpy() for tensor in (gram, right, solution, gains))
    refinements = REFINEMENTS if gram.dtype == torch.float64 and not want_gains else 0
    share = min(max(SEGMENT[0], -(-length // 4)), SEGMENT[1])
    starts = range(0, length, share)

    def solve_some(first: int) -> None:
        buffers = *np.empty((3, most, most)), np.empty(most, np.int64), np.empty((4, most))
        for begin in starts[first :: min(threads, len(starts))]:
            inside = slice(begin, begin + share)
            _solve(
                matrix, known[:, inside], on[inside], tiny, refinements, *buffers, found[:, inside], gained[:, inside]
            )

    threads = torch.get_num_threads()
    run_shares(solve_some, range(min(threads, len(starts))))
    return solution, gains if want_gains else None
