"""The compiled product of :mod:`~gblr_plugin.kernels.cpu.numba_float32` for bfloat16, on processors with AVX512-BF16.

x is packed as words of two columns, (tiles, n / 2, 16); z is summed in float32 and rounded once, when the components
of a row block are woven into pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit

from .compile_cache import compiled
from .simd import LANES, load_int32
from .simd_bfloat16 import dot_tile, expand_tile, pair_tile, reduce_tile, weave_tile

__all__ = ["product_part"]

CHUNK = 256  # tokens per pass; fewer passes over the factors pay more than a z in the second-level cache
WEAVE = 48  # tokens from which on the rows of U are woven into pairs once, not for every tile
_TABLE = 20  # bytes of a block's row in the table


@njit(nogil=True)
def _size(left):
    return 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@njit(nogil=True)
def _pack(x, x_row, tokens, tiles, pairs, packed):
    """Rows of x into (tiles, pairs, 16) words; lanes beyond the tokens are zero."""
    for tile in range(tiles):
        for lane in range(LANES):
            t, at = tile * LANES + lane, tile * pairs * LANES + lane
            for p in range(pairs):
                packed[at + p * LANES] = load_int32(x + t * x_row * 2 + p * 4) if t < tokens else 0


@cache
def product_part(narrow: bool) -> Callable[..., None]:
    """The product for lists of int16, or int32."""
    variant, word = ("bfloat16_narrow", 2) if narrow else ("bfloat16", 4)
    reduce_8, reduce_4, reduce_2, reduce_1 = (reduce_tile(r, 2, narrow) for r in (8, 4, 2, 1))
    single_8, single_4, single_2, single_1 = (reduce_tile(r, 1, narrow) for r in (8, 4, 2, 1))
    expand_8, expand_4, expand_2, expand_1 = (expand_tile(t, 2, False) for t in (8, 4, 2, 1))
    tail_8, tail_4, tail_2, tail_1 = (expand_tile(t, 1, True) for t in (8, 4, 2, 1))
    woven_8, woven_4, woven_2, woven_1 = (expand_tile(t, 2, False, woven=True) for t in (8, 4, 2, 1))
    pairs_of, weave = pair_tile(narrow), weave_tile()
    dot_4, dot_1 = (dot_tile(r, narrow) for r in (4, 1))

    @compiled(variant)
    def stage_one(factors, lists, table, blocks, x, pairs, z, num, tiles):
        x_tile, z_tile = pairs * LANES, num * LANES
        for b in range(blocks):
            row = table + b * _TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, v = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * 2
            panel, half = x + start // 2 * LANES * 4, width // 2
            i = 0
            while i < count:
                size = _size(count - i)
                v_i, list_i = v + i * width * 2, entries + i * word
                tile = 0
                while tile < tiles:
                    x_i, z_i = panel + tile * x_tile * 4, z + tile * z_tile * 4
                    if tiles - tile >= 2:
                        if size == 8:
                            reduce_8(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 4:
                            reduce_4(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 2:
                            reduce_2(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        else:
                            reduce_1(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        tile += 2
                    else:
                        if size == 8:
                            single_8(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 4:
                            single_4(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 2:
                            single_2(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        else:
                            single_1(v_i, width, half, x_i, x_tile, z_i, z_tile, list_i)
                        tile += 1
                i += size

    @compiled(variant)
    def stage_one_single(factors, lists, table, blocks, x, z):
        for b in range(blocks):
            row = table + b * _TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, v = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * 2
            i = 0
            while i + 4 <= count:
                dot_4(v + i * width * 2, width, width // 2, x + start * 2, z, entries + i * word)
                i += 4
            while i < count:
                dot_1(v + i * width * 2, width, width // 2, x + start * 2, z, entries + i * word)
                i += 1

    @compiled(variant)
    def stage_two(factors, lists, table, blocks, z, num, tokens, words, y, y_stride, bias):
        for b in range(blocks):
            row = table + b * _TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, u = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * 2
            woven = tokens >= WEAVE and width % (2 * LANES) == 0
            scratch = np.empty((count + 1) // 2 * width if woven else 0, np.int32)
            if woven:
                weave(u, count, width, scratch.ctypes.data)
            for first in range(0, tokens, LANES):
                pairs_of(z + first * num * 4, entries, count, words)
                last = min(tokens - first, LANES)
                j = 0
                while j < width:
                    whole = width - j >= 2 * LANES
                    lanes = min(width - j, LANES)
                    u_j = u + j * 2
                    bias_j = bias + (start + j) * 2 if bias != 0 else 0
                    t = 0
                    while t < last:
                        size = _size(last - t)
                        z_t, y_t = words + t * 4, y + ((first + t) * y_stride + start + j) * 2
                        if woven:
                            u_w = scratch.ctypes.data + j * 4
                            if size == 8:
                                woven_8(z_t, count, u_w, width, y_t, y_stride, bias_j, lanes)
                            elif size == 4:
                                woven_4(z_t, count, u_w, width, y_t, y_stride, bias_j, lanes)
                            elif size == 2:
                                woven_2(z_t, count, u_w, width, y_t, y_stride, bias_j, lanes)
                            else:
                                woven_1(z_t, count, u_w, width, y_t, y_stride, bias_j, lanes)
                        elif whole:
                            if size == 8:
                                expand_8(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            elif size == 4:
                                expand_4(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            elif size == 2:
                                expand_2(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            else:
                                expand_1(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        else:
                            if size == 8:
                                tail_8(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            elif size == 4:
                                tail_4(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            elif size == 2:
                                tail_2(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                            else:
                                tail_1(z_t, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        t += size
                    j += 2 * LANES if whole else lanes

    @compiled(variant, keep=True)
    def whole(
        x, x_row, x_column, tokens, n, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, y, y_stride
    ):
        """``x @ W.T + bias`` for some tokens, from addresses; x_column must be 1, block borders even, scales 0."""
        pairs = n // 2
        tiles = (min(tokens, CHUNK) + LANES - 1) // LANES
        packed = np.empty(tiles * pairs * LANES + 1, np.int32)
        z = np.empty(tiles * num * LANES + 1, np.float32)
        words = np.empty((num // 2 + 1) * LANES, np.int32)
        for at in range(0, tokens, CHUNK):
            part = min(tokens - at, CHUNK)
            tiles = (part + LANES - 1) // LANES
            col_table = lists + cols_at * 4
            z[:] = 0.0
            if tokens == 1:
                stage_one_single(factors, lists, col_table, cols, x, z.ctypes.data)
            else:
                _pack(x + at * x_row * 2, x_row, part, tiles, pairs, packed)
                stage_one(factors, lists, col_table, cols, packed.ctypes.data, pairs, z.ctypes.data, num, tiles)
            y_at = y + at * y_stride * 2
            z_at, words_at = z.ctypes.data, words.ctypes.data
            stage_two(factors, lists, lists + rows_at * 4, rows, z_at, num, part, words_at, y_at, y_stride, bias)

    return cast("Callable[..., None]", whole)
