"""What the compiled products of all dtypes share: block tables, and stage 1 of the product. Needs numba.

Stage 1 makes z, the sums of the components: ``z[list, :] += V_J x_J`` for every block J of columns. Tokens are packed
in tiles of 16 lanes, x as (tiles, words, 16) and z as (tiles, K, 16), where a word is one float32 or two bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from . import simd
from .compile_cache import compiled
from .processor import abilities
from .simd import LANES, choice, function, load_int32

__all__ = ["TABLE", "TALL", "TILES", "StageOne", "block_at", "item_size", "stage_one", "step_of", "variant_of"]

TABLE = 20  # bytes of a block's row in the table
_WIDE = abilities().wide
TILES = 2 if _WIDE else 1  # token tiles per register tile
TALL = 8 if _WIDE else 4  # components (stage 1) or tokens (stage 2) per register tile


def variant_of(kind: str, narrow: bool) -> str:
    """The name that tells functions for this kind of factors (``"float32"``, ``"int8"``, ``"bfloat16"``) apart."""
    return f"{kind}_narrow" if narrow else kind


def item_size(kind: str) -> int:
    """Bytes of a factor."""
    return {"float32": 4, "int8": 1, "bfloat16": 2}[kind]


@njit(nogil=True)
def step_of(left):
    """The largest number of rows that a register tile has and that are left."""
    return TALL if left >= TALL else 4 if left >= 4 else 2 if left >= 2 else 1


@njit(nogil=True)
def block_at(table, b):
    """Start, width, number of components, place of the list and place of the factors of a block."""
    row = table + b * TABLE
    sizes = load_int32(row), load_int32(row + 4), load_int32(row + 8)
    return *sizes, load_int32(row + 12), load_int32(row + 16)


class StageOne(NamedTuple):
    """Stage 1 over some column blocks, for tokens packed in tiles and for a single one."""

    tiles: Callable[..., None]
    single: Callable[..., None]


@cache
def stage_one(kind: str, narrow: bool) -> StageOne:
    """Stage 1 for a kind of factors and lists of int16 (``narrow``) or int32."""
    variant, item, word, int8 = variant_of(kind, narrow), item_size(kind), 2 if narrow else 4, kind == "int8"
    per_word = 2 if kind == "bfloat16" else 1
    if kind == "bfloat16":
        from . import simd_bfloat16

        reduce_tile, dots = simd_bfloat16.reduce_tile, [simd_bfloat16.dot_tile(r, narrow) for r in (1, 4)]
    else:
        reduce_tile, dots = simd.reduce_tile, [simd.dot_tile(r, int8, narrow) for r in (1, 4)]
    reduce = choice({4 * r + t: reduce_tile(r, t, narrow) for r in {1, 2, 4, TALL} for t in {1, TILES}})
    dot_1, dot_4 = (function(tile) for tile in dots)
    widen = function(simd.widen_tile())

    @compiled(variant)
    def tiles_of(factors, lists, table, blocks, x, words, z, num, tiles):
        x_tile, z_tile = words * LANES, num * LANES
        for b in range(blocks):
            start, width, count, list_at, data_at = block_at(table, b)
            entries, v = lists + list_at * word, factors + data_at * item
            panel = x + start // per_word * LANES * 4
            scratch = np.empty(TALL * width if int8 else 0, np.float32)
            i = 0
            while i < count:
                rows = step_of(count - i)
                v_i = v + i * width * item
                if int8:  # widened once for all tokens
                    widen(v_i, rows * width, scratch.ctypes.data)
                    v_i = scratch.ctypes.data
                tile = 0
                while tile < tiles:
                    some = TILES if tiles - tile >= TILES else 1
                    x_i, z_i = panel + tile * x_tile * 4, z + tile * z_tile * 4
                    reduce(4 * rows + some, v_i, width, width // per_word, x_i, x_tile, z_i, z_tile, entries + i * word)
                    tile += some
                i += rows

    @compiled(variant)
    def single(factors, lists, table, blocks, x, z):
        for b in range(blocks):
            start, width, count, list_at, data_at = block_at(table, b)
            entries, v = lists + list_at * word, factors + data_at * item
            x_b = x + start * (2 if per_word == 2 else 4)
            i = 0
            while i + 4 <= count:
                dot_4(v + i * width * item, width, width // per_word, x_b, z, entries + i * word)
                i += 4
            while i < count:
                dot_1(v + i * width * item, width, width // per_word, x_b, z, entries + i * word)
                i += 1

    return StageOne(tiles_of, single)
