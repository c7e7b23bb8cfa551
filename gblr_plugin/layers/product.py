"""Chooses how a layer multiplies: by two factors or by the dense matrix, over complete axes or over active blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .axis_blocks import MaskedAxis

__all__ = ["Product", "choose_product"]

_LEAST_FOR_BLOCKS = 5e7  # multiply-adds below which listing blocks costs more than they save
_BLOCK_OVERHEAD = 5e5  # multiply-adds that take as long as the extra calls of one block
_BLOCK_SLOWDOWN = 1.25  # time of a multiply-add inside a block over that outside: rows are gathered
_BLOCK_DENSE_SLOWDOWN = 1.45  # the same inside a block of the dense matrix


class Product(NamedTuple):
    """How to multiply: by the two factors or by the dense matrix, and over which blocks (``None``: complete axes)."""

    factored: bool
    rows: MaskedAxis | None
    cols: MaskedAxis | None


def choose_product(
    positions: int,
    components: int,
    shape: tuple[int, int],
    splits: int,
    axes: Callable[[], tuple[MaskedAxis, MaskedAxis]] | None,
    *,
    linear: bool,
) -> Product:
    """Choose the product of masked factors with fewest multiply-adds over ``positions`` inputs.

    Two full products take K (m / s + n) each; the dense matrix takes m n each and K m n / s once; both take less where
    blocks of the axes meet few components.

    Args:
        positions: Number of input vectors.
        components: K, of all splits together.
        shape: (m, n) of the whole matrix.
        splits: s matrices stacked in the rows.
        axes: Gives rows and columns by blocks; called only if they could be faster. ``None``: blocks cannot be used.
        linear: Whether factors can be multiplied over blocks; convolutions know the dense matrix over blocks alone.
    """
    m, n = shape
    per_split = m // splits
    factored = positions * components * (per_split + n)
    dense = components * per_split * n + positions * m * n
    plain = Product(factored <= dense, None, None)
    least = min(factored, dense)
    if axes is None or least < _LEAST_FOR_BLOCKS:
        return plain
    rows, cols = axes()
    overhead = _BLOCK_OVERHEAD * (len(rows.blocks) + len(cols.blocks))
    block_factored = _BLOCK_SLOWDOWN * positions * (rows.size + cols.size) + overhead
    block_dense = _BLOCK_DENSE_SLOWDOWN * rows.size * n + overhead + positions * m * n
    if not linear or block_dense < block_factored:
        return Product(False, rows, None) if block_dense < least else plain
    return Product(True, rows, cols) if block_factored < least else plain
