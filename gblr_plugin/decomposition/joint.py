r"""Least-squares fits of the factors of all components on one side, on given supports.

With the factors of the other side fixed, each index i of the axis is an independent small problem in the components
whose interval covers i. Its matrix is a submatrix of the fixed side's Gram matrix, which all indices share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.optional import solve_kernel

__all__ = ["conjugate_gradient", "gram_matrix", "supported_solve"]

CHUNK_ENTRIES = 1 << 22
"""Largest number of Gram entries gathered at once."""
GRAM_BLOCK = 128
"""Rows up to which a Gram matrix is one product."""
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Added to the diagonal of Gram matrices, relative to its mean: two components may be parallel on an index."""


def gram_matrix(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` of (K, N) rows; the blocks above the diagonal are copied from those below it."""
    num = len(rows)
    gram = rows.new_empty(num, num)
    pieces = [(0, num)]
    while pieces:
        begin, end = pieces.pop()
        if end - begin <= GRAM_BLOCK:
            gram[begin:end, begin:end] = rows[begin:end] @ rows[begin:end].T
            continue
        middle = (begin + end) // 2
        corner = rows[middle:end] @ rows[begin:middle].T
        gram[middle:end, begin:middle] = corner
        gram[begin:middle, middle:end] = corner.T
        pieces += [(begin, middle), (middle, end)]
    return gram


def supported_solve(
    gram: Tensor, right: Tensor, support: Tensor, *, want_gains: bool = False, ridge: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Solve ``gram[S, S] x[S] = right[S]`` for every column of ``right`` on its own support S.

    Args:
        gram: (K, K) symmetric positive semi-definite.
        right: (K, N).
        support: (K, N) bool.
        want_gains: Also return by how much each unknown lowers the error.
        ridge: Added to the diagonal of ``gram``, relative to its mean; default :data:`RIDGE`.

    Returns:
        x (K, N), zero off the support; and with ``want_gains`` (K, N) gains x^2 / (gram[S, S]^-1)_kk: by how much the
        squared error would grow if one unknown were dropped and the others refitted.
    """
    num, length = right.shape
    device, dtype = right.device, right.dtype
    solution = torch.zeros_like(right)
    gains = torch.zeros_like(right) if want_gains else None
    if num == 0:
        return solution, gains
    ridge = RIDGE[dtype] if ridge is None else ridge
    diagonal = gram.diagonal() + ridge * gram.diagonal().mean()
    gram = gram.clone()
    gram.diagonal().copy_(torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)))
    kernel = solve_kernel(gram, support.numel())
    if kernel is not None:
        return kernel(gram, right, support, want_gains)  # type: ignore[no-any-return]  # of an optional module
    # Problems of different sizes are solved in one batch: an extra component of zeros pads the smaller problems.
    padded, padded_right = F.pad(gram, (0, 1, 0, 1)), F.pad(right.T, (0, 1))
    counts = support.sum(0)
    order = torch.argsort(counts, stable=True)
    counts = counts[order]
    begin = int((counts == 0).sum())
    # Each index has a row in a table of its components; the rows of a chunk are padded to the longest of them.
    position, member = support.T[order].nonzero(as_tuple=True)
    slot = torch.arange(len(position), device=device) - (counts.cumsum(0) - counts)[position]
    bounds = counts.cumsum(0).tolist()
    sizes = counts.tolist()
    while begin < length:
        # Indices are sorted by count: find how many fit into one chunk when padded to the largest count among them.
        end = begin + 1
        step = max(1, CHUNK_ENTRIES // max(1, sizes[begin]) ** 2)
        end = min(length, begin + step, max(end, _reach(sizes, begin, 1.25)))
        width = sizes[end - 1]
        first = bounds[begin - 1] if begin else 0
        rows, cols, who = (
            position[first : bounds[end - 1]] - begin,
            slot[first : bounds[end - 1]],
            member[first : bounds[end - 1]],
        )
        table = torch.full((end - begin, width), num, dtype=torch.int64, device=device)
        table[rows, cols] = who
        small = padded[table[:, :, None], table[:, None, :]]
        small.diagonal(dim1=1, dim2=2).add_((table == num).to(dtype))
        rhs = padded_right[order[begin:end, None], table]
        factor, _ = torch.linalg.cholesky_ex(small)
        if gains is None:
            found = torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]
        else:
            inverse = torch.cholesky_inverse(factor)
            found = (inverse @ rhs[:, :, None])[:, :, 0]
            gained = found.square() / inverse.diagonal(dim1=1, dim2=2)
            gains[who, order[position[first : bounds[end - 1]]]] = gained[rows, cols]
        solution[who, order[position[first : bounds[end - 1]]]] = found[rows, cols]
        begin = end
    return solution, gains


def _reach(sizes: list[int], begin: int, slack: float) -> int:
    """First position whose size exceeds that at ``begin`` by more than ``slack`` (and at least 8)."""
    limit = max(sizes[begin] * slack, sizes[begin] + 8)
    low, high = begin, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if sizes[middle] <= limit else (low, middle)
    return low


def conjugate_gradient(
    gram: Tensor, moment: Tensor, right: Tensor, support: Tensor, start: Tensor, steps: int
) -> Tensor:
    """Approximate solution V, zero off its support, of ``(gram V moment)[S] = right[S]`` by preconditioned CG.

    The second moment couples the columns, so that they are no independent small problems.

    Args:
        gram: (K, K) Gram matrix of the row factors.
        moment: (n, n) second moment.
        right: (K, n).
        support: (K, n) bool.
        start: (K, n) first guess, zero off the support.
        steps: Iterations; the error never grows.
    """
    scale = torch.outer(gram.diagonal(), moment.diagonal())
    weight = torch.where(support, 1 / scale.clamp(min=torch.finfo(scale.dtype).tiny), torch.zeros_like(scale))
    x = start.clone()
    residual = right - gram @ x @ moment
    search = weight * residual
    level = (search * residual).sum()
    initial = level
    for _ in range(steps):
        if float(level) <= 1e-14 * float(initial) or not float(level) > 0:
            break
        image = gram @ search @ moment
        rate = level / (search * image).sum()
        x += rate * search
        residual -= rate * image
        preconditioned = weight * residual
        new_level = (preconditioned * residual).sum()
        search = preconditioned + new_level / level * search
        level = new_level
    return x
