"""Masks, masked factors and their gradients compiled with numba: one pass over memory each, without temporaries.

float32 and float64 on the CPU. Every function takes rows of a table's windows, see :mod:`gblr_plugin.layers.masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compile_cache import compiled
from .threads import run_shares

__all__ = ["block_entries", "block_gradients", "edge_sums", "masked_gradients", "window_differences"]

_SHARED = 1 << 18  # elements from which on several threads divide the work


@compiled("masks", keep=True, fast=True)
def _differences(prefix, first, last, out):
    n = out.shape[1]
    for k in range(out.shape[0]):
        p, q, o = prefix[first[k] : first[k] + n], prefix[last[k] : last[k] + n], out[k]
        for i in range(n):
            o[i] = p[i] - q[i]


@compiled("masks", keep=True, fast=True)
def _products(prefix, first, last, factor, out):
    n = out.shape[1]
    for k in range(out.shape[0]):
        p, q, f, o = prefix[first[k] : first[k] + n], prefix[last[k] : last[k] + n], factor[k], out[k]
        for i in range(n):
            o[i] = (p[i] - q[i]) * f[i]


@compiled("masks", keep=True, fast=True)
def _sums(slope, first, last, upstream, sums):
    n = upstream.shape[1]
    zero = slope[0] * 0
    for k in range(upstream.shape[0]):
        p, q, g = slope[first[k] : first[k] + n], slope[last[k] : last[k] + n], upstream[k]
        trailing = leading = zero
        for i in range(n):
            trailing += q[i] * g[i]
            leading += p[i] * g[i]
        sums[0, k], sums[1, k] = trailing, leading


@compiled("masks", keep=True, fast=True)
def _gradients(tables, first, last, upstream, factor, out, sums):
    n = out.shape[1]
    zero = tables[0, 0] * 0
    for k in range(out.shape[0]):
        p, q = tables[0, first[k] : first[k] + n], tables[0, last[k] : last[k] + n]
        s, r = tables[1, first[k] : first[k] + n], tables[1, last[k] : last[k] + n]
        g, f, o = upstream[k], factor[k], out[k]
        trailing = leading = zero
        for i in range(n):
            o[i] = (p[i] - q[i]) * g[i]
            both = g[i] * f[i]
            trailing += r[i] * both
            leading += s[i] * both
        sums[0, k], sums[1, k] = trailing, leading


@compiled("masks", keep=True, fast=True)
def _block_entries(prefix, lists, table, width, start, factor, out):
    n, at = factor.shape[1], 0
    member = 0
    for b in range(table.shape[0]):
        lower, size = table[b, 0], table[b, 1] - table[b, 0]
        for _ in range(table[b, 2]):
            k = lists[member]
            first = 2 * n + lower - start[k]
            last = first - width[k]
            p, q = prefix[first : first + size], prefix[last : last + size]
            f, o = factor[k, lower : lower + size], out[at : at + size]
            for i in range(size):
                o[i] = (p[i] - q[i]) * f[i]
            at += size
            member += 1


@compiled("masks", keep=True, fast=True)
def _block_gradients(tables, lists, table, width, start, factor, upstream, gradient, sums):
    n, at = factor.shape[1], 0
    zero = tables[0, 0] * 0
    gradient[:] = zero
    sums[:] = zero
    member = 0
    for b in range(table.shape[0]):
        lower, size = table[b, 0], table[b, 1] - table[b, 0]
        for _ in range(table[b, 2]):
            k = lists[member]
            first = 2 * n + lower - start[k]
            last = first - width[k]
            p, q = tables[0, first : first + size], tables[0, last : last + size]
            s, r = tables[1, first : first + size], tables[1, last : last + size]
            g, f, o = upstream[at : at + size], factor[k, lower : lower + size], gradient[k, lower : lower + size]
            trailing = leading = zero
            for i in range(size):
                o[i] = (p[i] - q[i]) * g[i]
                both = g[i] * f[i]
                trailing += r[i] * both
                leading += s[i] * both
            sums[0, k] += trailing
            sums[1, k] += leading
            at += size
            member += 1


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _by_components(run: Callable[[slice], None], num: int, n: int) -> None:
    """Run on slices of the components, one for each thread."""
    threads = torch.get_num_threads()
    if threads == 1 or num * n < _SHARED:
        run(slice(0, num))
        return
    share = -(-num // threads)
    run_shares(lambda at: run(slice(at, at + share)), range(0, num, share))


def window_differences(tables: Tensor, first: Tensor, last: Tensor, factor: Tensor | None) -> Tensor:
    """Masks, or masks times a factor.

    Args:
        tables: (2, 3N) from :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`.
        first: (K,) int64 first entries of the windows at the leading edges.
        last: (K,) int64, of those at the trailing edges.
        factor: (K, N) in the dtype of the tables, or ``None``.

    Returns:
        (K, N) ``tables[0, first + i] - tables[0, last + i]``, times the factor.
    """
    num, n = len(first), tables.shape[1] // 3
    out = torch.empty(num, n, dtype=tables.dtype)
    (windows, a, b), result = _arrays(tables[0], first, last), out.numpy()
    if factor is None:
        _by_components(lambda some: _differences(windows, a[some], b[some], result[some]), num, n)
        return out
    (values,) = _arrays(factor)
    _by_components(lambda some: _products(windows, a[some], b[some], values[some], result[some]), num, n)
    return out


def edge_sums(tables: Tensor, first: Tensor, last: Tensor, upstream: Tensor) -> Tensor:
    """(2, K) sums of ``upstream`` (K, N) against the width derivative at the trailing and at the leading edge."""
    num, n = upstream.shape
    sums = torch.empty(2, num, dtype=tables.dtype)
    (slope, a, b, g), result = _arrays(tables[1], first, last, upstream), sums.numpy()
    _by_components(lambda some: _sums(slope, a[some], b[some], g[some], result[:, some]), num, n)
    return sums


def masked_gradients(
    tables: Tensor, first: Tensor, last: Tensor, upstream: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """(K, N) gradient of a masked factor in the factor, and its (2, K) sums as of :func:`edge_sums`, in one pass."""
    num, n = upstream.shape
    out, sums = torch.empty(num, n, dtype=tables.dtype), torch.empty(2, num, dtype=tables.dtype)
    both, a, b, g, values = _arrays(tables, first, last, upstream, factor)
    gradient, result = out.numpy(), sums.numpy()
    _by_components(
        lambda some: _gradients(both, a[some], b[some], g[some], values[some], gradient[some], result[:, some]), num, n
    )
    return out, sums


def block_entries(
    tables: Tensor, lists: Tensor, table: Tensor, width: Tensor, start: Tensor, factor: Tensor, size: int
) -> Tensor:
    """Masked entries of all blocks of an axis, one after another.

    Args:
        tables: (2, 3N) from :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`.
        lists: (sum A,) int64, the components of all blocks.
        table: (blocks, 3) int64, first and last index of a block on the factor's axis and its number of components.
        width: (K,) int64 interval widths.
        start: (K,) int64 first indices.
        factor: (K, N) in the dtype of the tables.
        size: Sum of the blocks' entries.

    Returns:
        (size,) the (A, B) entries of each block, row-major.
    """
    out = torch.empty(size, dtype=tables.dtype)
    _block_entries(*_arrays(tables[0], lists, table, width, start, factor), out.numpy())
    return out


def block_gradients(
    tables: Tensor, lists: Tensor, table: Tensor, width: Tensor, start: Tensor, factor: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(K, N) gradient of the factor and (2, K) edge sums from ``upstream``, laid out as :func:`block_entries`."""
    gradient = torch.empty(factor.shape, dtype=tables.dtype)
    sums = torch.empty(2, len(factor), dtype=tables.dtype)
    arrays = _arrays(tables, lists, table, width, start, factor, upstream)
    _block_gradients(*arrays, gradient.numpy(), sums.numpy())
    return gradient, sums
