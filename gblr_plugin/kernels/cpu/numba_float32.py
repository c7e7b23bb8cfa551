"""The factored product in float32, with factors in float32 or int8, compiled with numba.

Stage 1 (:mod:`~gblr_plugin.kernels.cpu.numba_stages`) sums z over the column blocks in tiles of components x tokens.
Stage 2 writes each row block of y once, in tiles of tokens x rows. A single token takes dot products and no packing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from .compile_cache import compiled
from .numba_stages import TALL, TILES, block_at, item_size, step_of, variant_of
from .numba_stages import stage_one as stage_one_of
from .simd import LANES, choice, expand_tile, load_float32

__all__ = ["CHUNK", "functions"]

CHUNK = 64  # tokens per pass: z and the packed x then stay in the second-level cache
_VECTORS = TILES  # vectors of rows per register tile of stage 2


@njit(nogil=True)
def _pack(x, x_row, x_column, tokens, tiles, n, packed):
    """Copy tokens of any strides to (tiles, n, 16); lanes beyond the tokens are zero."""
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
    """Entry points: the product, stage 1 over some column blocks, stage 2 over some row blocks."""

    product: Callable[..., None]
    stage_one: Callable[..., None]
    stage_two: Callable[..., None]


@cache
def _stage_two(int8: bool, narrow: bool) -> Callable[..., None]:
    kind = "int8" if int8 else "float32"
    variant, item, word = variant_of(kind, narrow), item_size(kind), 2 if narrow else 4
    # Tiles of the full width, and those of what is left of a block.
    full = {t: expand_tile(t, _VECTORS, False, int8, narrow) for t in (1, 2, 4, TALL)}
    expand = choice(full | {16 + t: expand_tile(t, 1, True, int8, narrow) for t in full})

    @compiled(variant, keep=True)
    def stage_two(factors, lists, table, first, last, pieces, z, z_stride, z_tile, tokens, y, y_stride, bias):
        """Write some pieces of the row blocks, of which each has ``pieces``."""
        step = _VECTORS * LANES
        for piece in range(first, last):
            b, place = piece // pieces, piece % pieces
            start, width, count, list_at, data_at = block_at(table, b)
            entries, u = lists + list_at * word, factors + data_at * item
            j, end = width * place // pieces // step * step, width * (place + 1) // pieces // step * step
            if place == pieces - 1:
                end = width
            while j < end:
                tail = 0 if end - j >= step else 16
                lanes = min(end - j, LANES)
                u_j, y_j = u + j * item, y + (start + j) * 4
                bias_j = bias + (start + j) * 4 if bias != 0 else 0
                t = 0
                while t < tokens:
                    size = step_of(tokens - t)
                    z_t = z + (t // LANES * z_tile + t % LANES) * 4
                    y_t = y_j + t * y_stride * 4
                    expand(tail + size, z_t, z_stride, entries, count, u_j, width, y_t, y_stride, bias_j, lanes)
                    t += size
                j += lanes if tail else step

    return stage_two  # type: ignore[no-any-return]  # a function that numba compiles


@cache
def functions(int8: bool, narrow: bool) -> _Functions:
    """Functions for factors in float32, or in int8 with a scale per component that z is multiplied by."""
    kind = "int8" if int8 else "float32"
    variant, stage_two = variant_of(kind, narrow), _stage_two(int8, narrow)
    stage_one, stage_one_single = stage_one_of(kind, narrow)

    @compiled(variant, keep=True)
    def product(
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
            count = min(tokens - at, CHUNK)
            tiles = (count + LANES - 1) // LANES
            _pack(x + at * x_row * 4, x_row, x_column, count, tiles, n, packed)
            z[: tiles * num * LANES] = 0.0
            stage_one(factors, lists, col_table, cols, packed.ctypes.data, n, z.ctypes.data, num, tiles)
            if scales != 0:
                for row in range(tiles * num):
                    scale = load_float32(scales + row % num * 4)
                    for at_lane in range(row * LANES, (row + 1) * LANES):
                        z[at_lane] *= scale
            y_at = y + at * y_stride * 4
            z_at = z.ctypes.data
            stage_two(factors, lists, row_table, 0, rows, 1, z_at, LANES, num * LANES, count, y_at, y_stride, bias)

    @compiled(variant, keep=True)
    def some_columns(x, x_row, x_column, tokens, n, factors, lists, table, cols, num, z):
        """Stage 1 over some of the column blocks, into a z that the caller filled with zeros."""
        if tokens == 1:
            stage_one_single(factors, lists, table, cols, x, z)
            return
        tiles = (tokens + LANES - 1) // LANES
        packed = np.empty(tiles * n * LANES, np.float32)
        _pack(x, x_row, x_column, tokens, tiles, n, packed)
        stage_one(factors, lists, table, cols, packed.ctypes.data, n, z, num, tiles)
        packed[0] = 0.0  # as above

    return _Functions(product, some_columns, stage_two)
