"""The products of ``numba_float32`` and ``numba_bfloat16`` on tensors, by one thread or several.

Many tokens are divided among the threads. Few tokens are multiplied in two rounds: in stage 1 each thread takes some of
the entries and sums into a z of its own, in stage 2 each thread takes pieces of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..layout import Sizes
from .compile_cache import worker
from .numba_float32 import functions
from .numba_stages import TABLE, TILES, block_at, variant_of
from .simd import LANES, load_float32, load_int64, take_ticket
from .threads import run_team

__all__ = ["SHARED_BLOCKS", "SHARED_TOKENS", "is_shared", "kernel_for", "product", "run_product"]

SHARED_TOKENS = 1 << 20  # multiply-adds from which on several threads divide the tokens
SHARED_BLOCKS = 1 << 22  # multiply-adds from which on several threads divide the blocks, in two rounds
PIECES = 2  # of a row block in stage 2, so that threads get equal shares of few blocks
# The workers read int64 words: the ticket, the number of threads, the 16 arguments of a product, and one more word,
# which is the size of an element of x in bytes, or the address of the threads' sums.
_LAST = 8 * 18


def _kind(dtype: torch.dtype, int8: bool) -> str:
    return "bfloat16" if dtype == torch.bfloat16 else "int8" if int8 else "float32"


@cache
def _product_of(kind: str, narrow: bool) -> Callable[..., None]:
    if kind == "bfloat16":
        from .numba_bfloat16 import bfloat16_product  # only some processors have its instructions

        return bfloat16_product(narrow)
    return functions(kind == "int8", narrow).product


def kernel_for(dtype: torch.dtype, int8: bool, narrow: bool) -> Callable[..., None]:
    """The product on one thread, from addresses.

    Args:
        dtype: Dtype of x.
        int8: Whether the factors are int8, with scales.
        narrow: Whether the lists are int16.
    """
    return _product_of(_kind(dtype, int8), narrow)


@njit(nogil=True)
def _first_words(data):
    """x, x_row, x_column, tokens, n, factors, lists and the place of the column table."""
    at = data + 16
    x = load_int64(at), load_int64(at + 8), load_int64(at + 16), load_int64(at + 24), load_int64(at + 32)
    return *x, load_int64(at + 40), load_int64(at + 48), load_int64(at + 56)


@njit(nogil=True)
def _last_words(data):
    """Column blocks, place of the row table, row blocks, components, scales, bias, y and y_row."""
    at = data + 80
    counts = load_int64(at), load_int64(at + 8), load_int64(at + 16), load_int64(at + 24)
    return *counts, load_int64(at + 32), load_int64(at + 40), load_int64(at + 48), load_int64(at + 56)


@cache
def _token_worker(kind: str, narrow: bool) -> Any:
    run = _product_of(kind, narrow)

    @worker(variant_of(kind, narrow))
    def by_tokens(data):
        """The product for some of the tokens, in complete tiles."""
        x, x_row, x_column, tokens, n, factors, lists, cols_at = _first_words(data)
        cols, rows_at, rows, num, scales, bias, y, y_row = _last_words(data)
        item, threads, tiles = load_int64(data + _LAST), load_int64(data + 8), (tokens + LANES - 1) // LANES
        while True:
            share = take_ticket(data)
            if share >= threads:
                return
            first, last = tiles * share // threads * LANES, min(tiles * (share + 1) // threads * LANES, tokens)
            inputs = x + first * x_row * item, x_row, x_column, last - first, n
            to_y = y + first * y_row * item
            run(*inputs, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, to_y, y_row)

    return by_tokens


@njit(nogil=True)
def _components(entries, width, count):
    """How many of a block's components end within so many entries, in complete tiles unless these are all of them.

    Two neighbouring shares both ask for the border between them.
    """
    if entries <= 0:
        return 0
    return count if entries >= count * width else entries // width // 8 * 8


@cache
def _block_workers(int8: bool, narrow: bool) -> tuple[Any, Any]:
    run, variant = functions(int8, narrow), variant_of("int8" if int8 else "float32", narrow)
    stage_one, stage_two = run.stage_one, run.stage_two

    @worker(variant)
    def by_entries(data):
        """Stage 1 over the components of all column blocks, divided into shares of equally many entries."""
        x, x_row, x_column, tokens, n, factors, lists, cols_at = _first_words(data)
        cols, _, _, num, _, _, _, _ = _last_words(data)
        threads, sums, table = load_int64(data + 8), load_int64(data + _LAST), lists + cols_at * 4
        lanes = 1 if tokens == 1 else (tokens + LANES - 1) // LANES * LANES
        total = 0
        for b in range(cols):
            _, width, count, _, _ = block_at(table, b)
            total += width * count
        mine = np.empty((cols, TABLE // 4), np.int32)  # a table of this share's components
        while True:
            share = take_ticket(data)
            if share >= threads:
                return
            begin, end, before, blocks = total * share // threads, total * (share + 1) // threads, 0, 0
            for b in range(cols):
                start, width, count, list_at, data_at = block_at(table, b)
                first, last = _components(begin - before, width, count), _components(end - before, width, count)
                before += count * width
                if first < last:
                    mine[blocks, 0], mine[blocks, 1], mine[blocks, 2] = start, width, last - first
                    mine[blocks, 3], mine[blocks, 4] = list_at + first, data_at + first * width
                    blocks += 1
            z = sums + share * (num * lanes + 1) * 4
            stage_one(x, x_row, x_column, tokens, n, factors, lists, mine.ctypes.data, blocks, num, z)

    @worker(variant)
    def by_pieces(data):
        """Stage 2 for pieces of row blocks, after the threads' sums of stage 1 were added up."""
        _, _, _, tokens, _, factors, lists, _ = _first_words(data)
        _, rows_at, rows, num, scales, bias, y, y_row = _last_words(data)
        threads, sums, pieces = load_int64(data + 8), load_int64(data + _LAST), rows * PIECES
        lanes = 1 if tokens == 1 else (tokens + LANES - 1) // LANES * LANES
        wide = min(lanes, LANES)
        piece = take_ticket(data)
        if piece >= pieces:
            return
        z = np.empty(num * lanes + 1, np.float32)
        for i in range(num * lanes):
            z[i] = load_float32(sums + i * 4)
        for share in range(1, threads):
            for i in range(num * lanes):
                z[i] += load_float32(sums + (share * (num * lanes + 1) + i) * 4)
        if scales != 0:
            for row in range(num * lanes // wide):
                scale = load_float32(scales + row % num * 4)
                for i in range(row * wide, (row + 1) * wide):
                    z[i] *= scale
        table, z_at = lists + rows_at * 4, z.ctypes.data
        while piece < pieces:
            stage_two(factors, lists, table, piece, piece + 1, PIECES, z_at, wide, num * wide, tokens, y, y_row, bias)
            piece = take_ticket(data)
        z[0] = 0.0  # numba frees an array after its last use, and does not know of addresses

    return by_entries, by_pieces


def _by_tokens(dtype: torch.dtype, tokens: int, threads: int) -> bool:
    """Whether threads divide the tokens, and not the blocks."""
    return dtype == torch.bfloat16 or tokens >= threads * LANES * TILES


def is_shared(dtype: torch.dtype, tokens: int, entries: int, threads: int) -> bool:
    """Whether a product is divided among several threads.

    Args:
        dtype: Dtype of x.
        tokens: Number of rows of x.
        entries: Number of entries of the factors, with padding.
        threads: Number of threads that there are.
    """
    least = SHARED_TOKENS if _by_tokens(dtype, tokens, threads) else SHARED_BLOCKS
    return threads > 1 and tokens * entries >= least


def product(
    x: Tensor, factors: Tensor, lists: Tensor, bias: Tensor | None, sizes: Sizes, scales: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n) on the CPU, float32 or bfloat16.

    int8 factors come with float32 ``scales`` (components,), and take x in float32.

    Uses up to ``torch.get_num_threads()`` threads, for products that are large enough.
    """
    x = x if x.stride(1) == 1 or (x.shape[0] > 1 and x.dtype != torch.bfloat16) else x.contiguous()
    y = x.new_empty(x.shape[0], sizes.out_features)
    bias = None if bias is None else bias.contiguous()
    places = (sizes.cols_at, sizes.cols, sizes.rows_at, sizes.rows, sizes.components)
    bias_at, narrow = 0 if bias is None else bias.data_ptr(), not sizes.col_groups_at  # narrow lists have no groups
    run_product(x, x.stride(0), x.stride(1), len(x), x.shape[1], factors, lists, places, scales, bias_at, y, narrow)
    return y


def run_product(
    x: Tensor,
    x_row: int,
    x_column: int,
    tokens: int,
    n: int,
    factors: Tensor,
    lists: Tensor,
    places: tuple[int, ...],
    scales: Tensor | None,
    bias: int,
    y: Tensor,
    narrow: bool,
) -> None:
    """``y = x @ W.T + bias``, unchecked.

    Args:
        x: ``tokens`` rows of ``n``, with strides ``x_row`` and ``x_column`` in elements; bfloat16 has ``x_column`` 1.
        x_row: Stride of the rows.
        x_column: Stride of the columns.
        tokens: Number of rows.
        n: Number of columns.
        factors: Flat factors.
        lists: int32 or int16 lists.
        places: cols_at, cols, rows_at, rows and components of :class:`~gblr_plugin.kernels.layout.Sizes`.
        scales: As in :func:`product`.
        bias: Address of (m,) contiguous numbers, or 0.
        y: Contiguous (tokens, m), written.
        narrow: Whether the lists are int16.
    """
    if not tokens:
        return
    int8, num, threads = scales is not None, places[-1], torch.get_num_threads()
    arguments = (x.data_ptr(), x_row, x_column, tokens, n, factors.data_ptr(), lists.data_ptr(), *places)
    arguments += (0 if scales is None else scales.data_ptr(), bias, y.data_ptr(), y.shape[-1])
    if not is_shared(x.dtype, tokens, factors.numel(), threads):
        kernel_for(x.dtype, int8, narrow)(*arguments)
    elif _by_tokens(x.dtype, tokens, threads):
        data = np.array([0, threads, *arguments, x.itemsize], np.int64)
        run_team(_token_worker(_kind(x.dtype, int8), narrow), data.ctypes.data, threads)
    else:
        lanes = 1 if tokens == 1 else -(-tokens // LANES) * LANES
        sums = np.zeros(threads * (num * lanes + 1), np.float32)
        data = np.array([0, threads, *arguments, sums.ctypes.data], np.int64)
        first, second = _block_workers(int8, narrow)
        run_team(first, data.ctypes.data, threads)
        data[0] = 0
        run_team(second, data.ctypes.data, threads)
