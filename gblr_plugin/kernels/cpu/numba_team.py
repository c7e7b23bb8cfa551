"""The products of ``numba_float32`` and ``numba_bfloat16`` on tensors, by one thread or several.

Several threads share many tokens. Few tokens they share by blocks, in two rounds: each sums some of the entries of
stage 1 into a z of its own, and after that writes pieces of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .compile_cache import worker
from .numba_float32 import TABLE, TILES, functions
from .simd import LANES, load_float32, load_int32, load_int64, take_ticket
from .threads import run_team

__all__ = ["WORTH_THREADS", "is_shared", "kernel_for", "product", "run_product"]

WORTH_THREADS = 1 << 20  # multiply-adds from which on sharing tokens pays
WORTH_ROUNDS = 1 << 22  # the same for sharing blocks, in two rounds
PIECES = 2  # of a row block, so that few blocks are shared fairly
# Where the workers find what they need, in int64 words; the first is the ticket, the second the number of parts.
# x, x_row, x_column, tokens, n, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, y and y_row follow.
_ARGUMENTS = 2
_ITEM, _SUMS = 18, 18  # bytes of an element of x; address of the threads' sums


@cache
def _bfloat16_product(narrow: bool) -> Callable[..., None]:
    """Imported on first use: its instructions exist on some processors only."""
    from .numba_bfloat16 import product_part

    return product_part(narrow)


def kernel_for(dtype: torch.dtype, int8: bool, narrow: bool) -> Callable[..., None]:
    """The whole product on one thread, from addresses.

    Args:
        dtype: Of x.
        int8: Are the factors int8, with scales.
        narrow: Are the lists int16.
    """
    return _bfloat16_product(narrow) if dtype == torch.bfloat16 else functions(int8, narrow).whole


@cache
def _token_worker(variant: str, whole: Callable[..., None]) -> Any:
    @worker(variant)
    def by_tokens(data):
        at = data + 8 * _ARGUMENTS
        x, x_row, x_column, tokens = load_int64(at), load_int64(at + 8), load_int64(at + 16), load_int64(at + 24)
        n, factors, lists, cols_at = load_int64(at + 32), load_int64(at + 40), load_int64(at + 48), load_int64(at + 56)
        cols, rows_at, rows, num = load_int64(at + 64), load_int64(at + 72), load_int64(at + 80), load_int64(at + 88)
        scales, bias, y, y_row = load_int64(at + 96), load_int64(at + 104), load_int64(at + 112), load_int64(at + 120)
        item, parts, tiles = load_int64(data + 8 * _ITEM), load_int64(data + 8), (tokens + LANES - 1) // LANES
        while True:
            part = take_ticket(data)
            if part >= parts:
                return
            first, last = tiles * part // parts * LANES, min(tiles * (part + 1) // parts * LANES, tokens)
            own = x + first * x_row * item, x_row, x_column, last - first, n
            to = y + first * y_row * item
            whole(*own, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, to, y_row)

    return by_tokens


@njit(nogil=True)
def _components(entries, width, count):
    """How many of a block's components end within so many of its entries, whole tiles where that is not all of them.

    The border of two parts is asked for by both.
    """
    if entries <= 0:
        return 0
    return count if entries >= count * width else entries // width // 8 * 8


@cache
def _block_workers(int8: bool, narrow: bool) -> tuple[Any, Any]:
    run = functions(int8, narrow)
    variant = ("int8" if int8 else "float32") + ("_narrow" if narrow else "")
    first_part, stage_two = run.first_part, run.stage_two

    @worker(variant)
    def by_entries(data):
        """Stage 1 over the components of all column blocks, cut into parts of as many entries."""
        at = data + 8 * _ARGUMENTS
        x, x_row, x_column, tokens = load_int64(at), load_int64(at + 8), load_int64(at + 16), load_int64(at + 24)
        n, factors, lists, cols_at = load_int64(at + 32), load_int64(at + 40), load_int64(at + 48), load_int64(at + 56)
        cols, num = load_int64(at + 64), load_int64(at + 88)
        parts, sums, table = load_int64(data + 8), load_int64(data + 8 * _SUMS), lists + cols_at * 4
        lanes = 1 if tokens == 1 else (tokens + LANES - 1) // LANES * LANES
        total = 0
        for b in range(cols):
            total += load_int32(table + b * TABLE + 4) * load_int32(table + b * TABLE + 8)
        own = np.empty((cols, 5), np.int32)
        while True:
            part = take_ticket(data)
            if part >= parts:
                return
            begin, end, before, blocks = total * part // parts, total * (part + 1) // parts, 0, 0
            for b in range(cols):
                row = table + b * TABLE
                width, count = load_int32(row + 4), load_int32(row + 8)
                first, last = _components(begin - before, width, count), _components(end - before, width, count)
                before += count * width
                if first < last:
                    own[blocks, 0], own[blocks, 1], own[blocks, 2] = load_int32(row), width, last - first
                    own[blocks, 3], own[blocks, 4] = load_int32(row + 12) + first, load_int32(row + 16) + first * width
                    blocks += 1
            z = sums + part * (num * lanes + 1) * 4
            first_part(x, x_row, x_column, tokens, n, factors, lists, own.ctypes.data, blocks, num, z)

    @worker(variant)
    def by_pieces(data):
        """Stage 2 for pieces of row blocks, after the sum of what stage 1 left."""
        at = data + 8 * _ARGUMENTS
        tokens, factors, lists = load_int64(at + 24), load_int64(at + 40), load_int64(at + 48)
        rows_at, rows, num, scales = load_int64(at + 72), load_int64(at + 80), load_int64(at + 88), load_int64(at + 96)
        bias, y, y_row = load_int64(at + 104), load_int64(at + 112), load_int64(at + 120)
        parts, sums, pieces = load_int64(data + 8), load_int64(data + 8 * _SUMS), rows * PIECES
        lanes = 1 if tokens == 1 else (tokens + LANES - 1) // LANES * LANES
        wide = min(lanes, LANES)
        own = take_ticket(data)
        if own >= pieces:
            return
        z = np.empty(num * lanes + 1, np.float32)
        for i in range(num * lanes):
            z[i] = load_float32(sums + i * 4)
        for part in range(1, parts):
            other = sums + part * (num * lanes + 1) * 4
            for i in range(num * lanes):
                z[i] += load_float32(other + i * 4)
        if scales != 0:
            for row in range(num * lanes // wide):
                scale = load_float32(scales + row % num * 4)
                for i in range(row * wide, (row + 1) * wide):
                    z[i] *= scale
        table, z_at = lists + rows_at * 4, z.ctypes.data
        while own < pieces:
            stage_two(factors, lists, table, own, own + 1, PIECES, z_at, wide, num * wide, tokens, y, y_row, bias)
            own = take_ticket(data)
        z[0] = 0.0  # numba frees an array after its last use, and does not know of addresses

    return by_entries, by_pieces


def _by_tokens(dtype: torch.dtype, tokens: int, threads: int) -> bool:
    """Whether threads share the tokens, and not the blocks."""
    return dtype == torch.bfloat16 or tokens >= threads * LANES * TILES


def is_shared(dtype: torch.dtype, tokens: int, entries: int, threads: int) -> bool:
    """Whether a product is worth more than one thread.

    Args:
        dtype: Of x.
        tokens: Rows of x.
        entries: Of the factors, as stored.
        threads: As many as there are.
    """
    least = WORTH_THREADS if _by_tokens(dtype, tokens, threads) else WORTH_ROUNDS
    return threads > 1 and tokens * entries >= least


def product(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    bias: Tensor | None,
    cols_at: int,
    cols: int,
    col_groups_at: int,
    col_width: int,
    rows_at: int,
    rows: int,
    row_groups_at: int,
    row_width: int,
    components: int,
    out_features: int,
    scales: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n) on the CPU, float32 or bfloat16; sizes as in the operator of ``compiled``.

    int8 factors come with float32 ``scales`` (components,), and take x in float32.

    Uses as many threads as ``torch.get_num_threads()`` says, where the work is worth it.
    """
    half = x.dtype == torch.bfloat16
    x = x if x.stride(1) == 1 or (x.shape[0] > 1 and not half) else x.contiguous()
    y = x.new_empty(x.shape[0], out_features)
    bias = None if bias is None else bias.contiguous()
    places = (cols_at, cols, rows_at, rows, components)
    bias_at, narrow = 0 if bias is None else bias.data_ptr(), not col_groups_at  # narrow lists come without groups
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
    """``y = x @ W.T + bias`` without a question asked.

    Args:
        x: ``tokens`` rows of ``n``, with strides ``x_row`` and ``x_column`` in elements; bfloat16 has ``x_column`` 1.
        x_row: Stride of the rows.
        x_column: Stride of the columns.
        tokens: Number of rows.
        n: Number of columns.
        factors: Flat factors.
        lists: int32 or int16 lists.
        places: cols_at, cols, rows_at, rows and components, as in the operator of ``compiled``.
        scales: As in :func:`product`.
        bias: Address of (m,) contiguous numbers, or 0.
        y: Contiguous (tokens, m), written.
        narrow: Are the lists int16.
    """
    half, m, num, int8 = x.dtype == torch.bfloat16, y.shape[-1], places[-1], scales is not None
    run = kernel_for(x.dtype, int8, narrow)
    scales_at = 0 if scales is None else scales.data_ptr()
    arguments = (x.data_ptr(), x_row, x_column, tokens, n, factors.data_ptr(), lists.data_ptr(), *places)
    arguments += (scales_at, bias, y.data_ptr(), m)
    threads = torch.get_num_threads()
    if not tokens:
        return
    if not is_shared(x.dtype, tokens, factors.numel(), threads):
        run(*arguments)
        return
    if _by_tokens(x.dtype, tokens, threads):
        data = np.array([0, threads, *arguments, x.itemsize], np.int64)
        variant = f"{'bfloat16' if half else 'int8' if int8 else 'float32'}{'_narrow' if narrow else ''}"
        run_team(_token_worker(variant, run), data.ctypes.data, threads)
        return
    lanes = 1 if tokens == 1 else -(-tokens // LANES) * LANES
    sums = np.zeros(threads * (num * lanes + 1), np.float32)
    data = np.array([0, threads, *arguments, sums.ctypes.data], np.int64)
    first, second = _block_workers(int8, narrow)
    run_team(first, data.ctypes.data, threads)
    data[0] = 0
    run_team(second, data.ctypes.data, threads)
