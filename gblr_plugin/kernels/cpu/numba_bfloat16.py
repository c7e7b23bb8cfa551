"""The factored product in bfloat16, compiled with numba for processors with AVX512-BF16.

x is packed in words of two columns, (tiles, n / 2, 16). z is summed in float32, and rounded once when the components of
a row block are woven into pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit

from .compile_cache import compiled
from .numba_stages import TALL, block_at, step_of, variant_of
from .numba_stages import stage_one as stage_one_of
from .simd import LANES, choice, function, load_int32
from .simd_bfloat16 import expand_tile, pair_tile, weave_tile

__all__ = ["bfloat16_product"]

CHUNK = 256  # tokens per pass; fewer passes over the factors save more time than a z that fits the second-level cache
WEAVE = 48  # tokens from which on the rows of U are woven into pairs once, and not for every tile


@njit(nogil=True)
def _pack(x, x_row, tokens, tiles, pairs, packed):
    """Copy rows of x to (tiles, pairs, 16) words; lanes beyond the tokens are zero."""
    for tile in range(tiles):
        for lane in range(LANES):
            t, at = tile * LANES + lane, tile * pairs * LANES + lane
            for p in range(pairs):
                packed[at + p * LANES] = load_int32(x + t * x_row * 2 + p * 4) if t < tokens else 0


@cache
def bfloat16_product(narrow: bool) -> Callable[..., None]:
    """The product for lists of int16, or int32."""
    variant, word = variant_of("bfloat16", narrow), 2 if narrow else 4
    stage_one, stage_one_single = stage_one_of("bfloat16", narrow)
    # Tiles of the full width, those of what is left of a block, and those of rows that were woven into pairs.
    full = {t: expand_tile(t, 2, False) for t in (1, 2, 4, TALL)}
    tails = {16 + t: expand_tile(t, 1, True) for t in full}
    expand = choice(full | tails | {32 + t: expand_tile(t, 2, False, woven=True) for t in full})
    pairs_of, weave = function(pair_tile(narrow)), function(weave_tile())

    @compiled(variant)
    def stage_two(factors, lists, table, blocks, z, num, tokens, words, y, y_stride, bias):
        for b in range(blocks):
            start, width, count, list_at, data_at = block_at(table, b)
            entries, u = lists + list_at * word, factors + data_at * 2
            woven = tokens >= WEAVE and width % (2 * LANES) == 0
            scratch = np.empty((count + 1) // 2 * width if woven else 0, np.int32)
            if woven:
                weave(u, count, width, scratch.ctypes.data)
            for first in range(0, tokens, LANES):
                pairs_of(z + first * num * 4, entries, count, words)
                last = min(tokens - first, LANES)
                j = 0
                while j < width:
                    lanes = min(width - j, LANES)
                    key = 32 if woven else 0 if width - j >= 2 * LANES else 16
                    u_j = scratch.ctypes.data + j * 4 if woven else u + j * 2
                    bias_j = bias + (start + j) * 2 if bias != 0 else 0
                    t = 0
                    while t < last:
                        size = step_of(last - t)
                        y_t = y + ((first + t) * y_stride + start + j) * 2
                        expand(key + size, words + t * 4, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        t += size
                    j += lanes if key == 16 else 2 * LANES

    @compiled(variant, keep=True)
    def product(
        x, x_row, x_column, tokens, n, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, y, y_stride
    ):
        """``x @ W.T + bias`` for some tokens, from addresses; x_column must be 1, block borders even, scales 0."""
        pairs = n // 2
        tiles = (min(tokens, CHUNK) + LANES - 1) // LANES
        packed = np.empty(tiles * pairs * LANES + 1, np.int32)
        z = np.empty(tiles * num * LANES + 1, np.float32)
        words = np.empty((num // 2 + 1) * LANES, np.int32)
        for at in range(0, tokens, CHUNK):
            count = min(tokens - at, CHUNK)
            tiles = (count + LANES - 1) // LANES
            col_table = lists + cols_at * 4
            z[:] = 0.0
            if tokens == 1:
                stage_one_single(factors, lists, col_table, cols, x, z.ctypes.data)
            else:
                _pack(x + at * x_row * 2, x_row, count, tiles, pairs, packed)
                stage_one(factors, lists, col_table, cols, packed.ctypes.data, pairs, z.ctypes.data, num, tiles)
            y_at = y + at * y_stride * 2
            z_at, words_at = z.ctypes.data, words.ctypes.data
            stage_two(factors, lists, lists + rows_at * 4, rows, z_at, num, count, words_at, y_at, y_stride, bias)

    return cast("Callable[..., None]", product)
