"""The factored product compiled with numba: no call per block, no copies of z, few tokens included. Optional.

float32; the factors may be int8. Tokens are packed in tiles of 16 lanes: x as (tiles, n, 16) and z as (tiles, K, 16).
Stage 1 adds up z over the column blocks in tiles of components x tokens; stage 2 writes each row block of y once, in
tiles of tokens x rows, right into the row-major result. One token takes dot products instead, and no packing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from .compile_cache import compiled
from .processor import abilities
from .simd import LANES, dot_tile, expand_tile, load_float32, load_int32, reduce_tile, widen_tile

__all__ = ["CHUNK", "TABLE", "TILES", "functions"]

TABLE = 20  # bytes of a block's row in the table
CHUNK = 64  # tokens per pass: z and the packed x then stay in the second-level cache
_WIDE = abilities().wide
TILES = 2 if _WIDE else 1  # token tiles per register tile
_TALL = 8 if _WIDE else 4  # components (stage 1) or tokens (stage 2) per register tile


@njit(nogil=True)
def _pack(x, x_row, x_column, tokens, tiles, n, packed):
    """Tokens of any strides into (tiles, n, 16); lanes beyond the tokens are zero."""
    for tile in range(tiles):
        left = min(tokens - tile * LANES, LANES)
        at, corner = tile * n * LANES, x + tile * LANES * x_row * 4
        if left < LANES:
            packed[at : at + n * LANES] = 0.0
        if x_row == 1 and left == LANES:  # tokens side by side, as convolutions unfold them
            for c in range(n):
                for lane in range(LANES):
                    packed[at + c * LANES + lane] = load_float32(corner + (c * x_column + lane) * 4)
        else:
            for lane in range(left):
                row = corner + lane * x_row * 4
                for c in range(n):
                    packed[at + c * LANES + lane] = load_float32(row + c * x_column * 4)


class _Functions(NamedTuple):
    """Entry points: the whole product, stage 1 over some column blocks, stage 2 over some row blocks."""

    whole: Callable[..., None]
    first_part: Callable[..., None]
    stage_two: Callable[..., None]


@cache
def functions(int8: bool, narrow: bool) -> _Functions:
    """Functions for factors in float32, or in int8 with a scale per component that z is multiplied by."""
    variant, item = ("int8", 1) if int8 else ("float32", 4)
    variant, word = (f"{variant}_narrow", 2) if narrow else (variant, 4)
    reduce = {(r, t): reduce_tile(r, t, narrow) for r in (1, 2, 4, _TALL) for t in (1, TILES)}
    reduce_tall, reduce_4, reduce_2, reduce_1 = (reduce[r, TILES] for r in (_TALL, 4, 2, 1))
    reduce_tall_one, reduce_4_one, reduce_2_one, reduce_1_one = (reduce[r, 1] for r in (_TALL, 4, 2, 1))
    expand_tall, expand_4, expand_2, expand_1 = (
        expand_tile(t, 2 if _WIDE else 1, False, int8, narrow) for t in (_TALL, 4, 2, 1)
    )
    tail_tall, tail_4, tail_2, tail_1 = (expand_tile(t, 1, True, int8, narrow) for t in (_TALL, 4, 2, 1))
    dot_4, dot_1 = (dot_tile(r, int8, narrow) for r in (4, 1))
    widen = widen_tile()

    @compiled(variant)
    def stage_one(factors, lists, table, blocks, x, n, z, num, tiles):
        x_tile, z_tile = n * LANES, num * LANES
        for b in range(blocks):
            row = table + b * TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, v = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * item
            panel = x + start * LANES * 4
            scratch = np.empty(_TALL * width if int8 else 0, np.float32)
            i = 0
            while i < count:
                left = count - i
                size = _TALL if left >= _TALL else 4 if left >= 4 else 2 if left >= 2 else 1
                v_i, list_i = v + i * width * item, entries + i * word
                if int8:  # widened once for all tokens
                    widen(v_i, size * width, scratch.ctypes.data)
                    v_i = scratch.ctypes.data
                tile = 0
                while tile < tiles:
                    x_i, z_i = panel + tile * x_tile * 4, z + tile * z_tile * 4
                    if tiles - tile >= TILES:
                        if size == _TALL:
                            reduce_tall(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 4:
                            reduce_4(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 2:
                            reduce_2(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        else:
                            reduce_1(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        tile += TILES
                    else:
                        if size == _TALL:
                            reduce_tall_one(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 4:
                            reduce_4_one(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        elif size == 2:
                            reduce_2_one(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        else:
                            reduce_1_one(v_i, width, width, x_i, x_tile, z_i, z_tile, list_i)
                        tile += 1
                i += size

    @compiled(variant)
    def stage_one_single(factors, lists, table, blocks, x, z):
        for b in range(blocks):
            row = table + b * TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, v = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * item
            i = 0
            while i + 4 <= count:
                dot_4(v + i * width * item, width, width, x + start * 4, z, entries + i * word)
                i += 4
            while i < count:
                dot_1(v + i * width * item, width, width, x + start * 4, z, entries + i * word)
                i += 1

    @compiled(variant, keep=True)
    def stage_two(factors, lists, table, first, last, pieces, z, z_stride, z_tile, tokens, y, y_stride, bias):
        """Some pieces of the row blocks, which are cut into ``pieces`` each."""
        step = 2 * LANES if _WIDE else LANES
        for piece in range(first, last):
            b, of = piece // pieces, piece % pieces
            row = table + b * TABLE
            start, width, count = load_int32(row), load_int32(row + 4), load_int32(row + 8)
            entries, u = lists + load_int32(row + 12) * word, factors + load_int32(row + 16) * item
            j, end = width * of // pieces // step * step, width * (of + 1) // pieces // step * step
            if of == pieces - 1:
                end = width
            while j < end:
                whole = end - j >= step
                lanes = min(end - j, LANES)
                u_j, y_j = u + j * item, y + (start + j) * 4
                bias_j = bias + (start + j) * 4 if bias != 0 else 0
                t = 0
                while t < tokens:
                    left = tokens - t
                    size = _TALL if left >= _TALL else 4 if left >= 4 else 2 if left >= 2 else 1
                    z_t = z + (t // LANES * z_tile + t % LANES) * 4
                    y_t = y_j + t * y_stride * 4
                    if whole:
                        if size == _TALL:
                            expand_tall(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        elif size == 4:
                            expand_4(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        elif size == 2:
                            expand_2(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        else:
                            expand_1(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                    else:
                        if size == _TALL:
                            tail_tall(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        elif size == 4:
                            tail_4(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        elif size == 2:
                            tail_2(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                        else:
                            tail_1(z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                    t += size
                j += step if whole else lanes

    @compiled(variant, keep=True)
    def whole(
        x, x_row, x_column, tokens, n, factors, lists, cols_at, cols, rows_at, rows, num, scales, bias, y, y_stride
    ):
        if tokens == 0:
            return
        col_table, row_table = lists + cols_at * 4, lists + rows_at * 4
        if tokens == 1:
            z = np.zeros(num + 1, np.float32)
            stage_one_single(factors, lists, col_table, cols, x, z.ctypes.data)
            if scales != 0:
                for k in range(num):
                    z[k] *= load_float32(scales + k * 4)
            stage_two(factors, lists, row_table, 0, rows, 1, z.ctypes.data, 1, 0, 1, y, y_stride, bias)
            z[0] = 0.0  # numba frees an array after its last use, and does not know of addresses
            return
        tiles = (min(tokens, CHUNK) + LANES - 1) // LANES
        packed = np.empty(tiles * n * LANES, np.float32)
        z = np.empty(tiles * num * LANES + 1, np.float32)
        for at in range(0, tokens, CHUNK):
            part = min(tokens - at, CHUNK)
            tiles = (part + LANES - 1) // LANES
            _pack(x + at * x_row * 4, x_row, x_column, part, tiles, n, packed)
            z[: tiles * num * LANES] = 0.0
            stage_one(factors, lists, col_table, cols, packed.ctypes.data, n, z.ctypes.data, num, tiles)
            if scales != 0:
                for row in range(tiles * num):
                    scale = load_float32(scales + row % num * 4)
                    for at_lane in range(row * LANES, (row + 1) * LANES):
                        z[at_lane] *= scale
            y_at = y + at * y_stride * 4
            z_at = z.ctypes.data
            stage_two(factors, lists, row_table, 0, rows, 1, z_at, LANES, num * LANES, part, y_at, y_stride, bias)

    @compiled(variant, keep=True)
    def first_part(x, x_row, x_column, tokens, n, factors, lists, table, cols, num, z):
        """Stage 1 over some of the column blocks, into a z of its own (zeroed by the caller)."""
        if tokens == 1:
            stage_one_single(factors, lists, table, cols, x, z)
            return
        tiles = (tokens + LANES - 1) // LANES
        packed = np.empty(tiles * n * LANES, np.float32)
        _pack(x, x_row, x_column, tokens, tiles, n, packed)
        stage_one(factors, lists, table, cols, packed.ctypes.data, n, z, num, tiles)
        packed[0] = 0.0  # as above

    return _Functions(whole, first_part, stage_two)
