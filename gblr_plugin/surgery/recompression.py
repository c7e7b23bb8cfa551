"""Crowded boxes: components that together cost more than the dense block they lie in, stored as that block.

An h x w block is min(h, w) components of one row (or column) each, whose other factor holds the entries:
h w + min(h, w) multiply-adds, one a row more than the block itself, in the storage and kernels of all components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..matrix.structure import Intervals, StructuredMatrix

__all__ = ["recompressed"]

_CHUNK = 1 << 20  # pairs of a box and a component compared at once


def _inside(inner: Intervals, box: Intervals) -> Tensor:
    """(boxes, K) bool: does a cyclic interval lie in another."""
    offset = (inner.start - box.start[:, None]) % inner.length
    whole = (box.width == box.length)[:, None]
    return whole | (offset + inner.width <= box.width[:, None])


def _crowded(rows: Intervals, cols: Intervals) -> list[Tensor]:
    """Disjoint sets of components, each with its box first: the box of that component holds the others.

    The set costs more than the block, and is no smaller than what replaces it: fewer components would meet fewer
    blocks of the storage than the rows of a block do, and be faster as they are.
    """
    cost = rows.width + cols.width
    fewest = torch.minimum(rows.width, cols.width)
    limit = rows.width * cols.width + fewest
    boxes = (limit < cost.sum()).nonzero()[:, 0]
    found = []
    for part in boxes.split(max(_CHUNK // max(len(cost), 1), 1)):
        held = _inside(rows, rows.select(part)) & _inside(cols, cols.select(part))
        gain = (held * cost).sum(1) - limit[part]
        for at in ((gain > 0) & (held.sum(1) >= fewest[part])).nonzero()[:, 0].tolist():
            found.append((int(gain[at]), int(part[at]), held[at]))
    taken = torch.zeros_like(cost, dtype=torch.bool)
    sets = []
    for _, box, held in sorted(found, key=lambda entry: -entry[0]):
        own = held & ~taken
        if int(cost[own].sum()) > int(limit[box]) and int(own.sum()) >= int(fewest[box]):
            taken |= own
            members = own.nonzero()[:, 0]
            sets.append(torch.cat([torch.full_like(members[:1], box), members]))
    return sets


def _block(matrix: StructuredMatrix, box: Tensor, members: Tensor) -> tuple[Tensor, ...]:
    """What replaces the members of a box: u, v, row widths and starts, column widths and starts."""
    axes = matrix.rows, matrix.cols
    sizes = [int(axis.width[box]) for axis in axes]
    places = [
        (torch.arange(size, device=box.device) + axis.start[box]) % axis.length
        for size, axis in zip(sizes, axes, strict=True)
    ]
    u, v = matrix.u[members][:, places[0]].double(), matrix.v[members][:, places[1]].double()
    entries = (u.T @ v).to(matrix.u.dtype)
    short = 0 if sizes[0] <= sizes[1] else 1  # the axis on which each component has one index
    count = sizes[short]
    factors = [matrix.u.new_zeros(count, axis.length) for axis in axes]
    factors[short][torch.arange(count, device=box.device), places[short]] = 1
    factors[1 - short][:, places[1 - short]] = entries if short == 0 else entries.T
    one, start = torch.ones_like(places[short]), axes[1 - short].start[box].expand(count)
    ends = [(one, places[short]), (one * sizes[1 - short], start)]
    return (*factors, *ends[short], *ends[1 - short])


@torch.no_grad()
def recompressed(matrix: StructuredMatrix) -> StructuredMatrix:
    """The same matrix with its crowded boxes stored dense.

    Boxes are those of its components (cyclic, within a row split). In one, all components that lie inside are replaced
    if they cost more than h w + min(h, w) and are at least min(h, w) in number.

    Args:
        matrix: Any GBLR matrix.

    Returns:
        The matrix itself where no box is crowded; else one of fewer multiply-adds, equal up to rounding, with the new
        components after the others of their split.
    """
    while True:
        keep = matrix.component_multiply_adds > 0
        added: list[tuple[int, tuple[Tensor, ...]]] = []
        first = 0
        for split, size in enumerate(matrix.split_sizes):
            own = torch.arange(first, first + size, device=keep.device)[keep[first : first + size]]
            first += size
            for found in _crowded(matrix.rows.select(own), matrix.cols.select(own)):
                members = own[found[1:]]
                keep[members] = False
                added.append((split, _block(matrix, own[found[0]], members)))
        if not added:
            return matrix
        old = (matrix.u, matrix.v, matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start)
        pieces: list[tuple[Tensor, ...]] = []
        sizes, first = [], 0
        for split, size in enumerate(matrix.split_sizes):
            own = torch.arange(first, first + size, device=keep.device)[keep[first : first + size]]
            first += size
            mine = [tuple(part[own] for part in old), *(parts for of, parts in added if of == split)]
            sizes.append(sum(len(parts[0]) for parts in mine))
            pieces += mine
        u, v, row_width, row_start, col_width, col_start = (torch.cat(part) for part in zip(*pieces, strict=True))
        matrix = StructuredMatrix(
            u,
            v,
            Intervals(row_width, row_start, matrix.rows.length),
            Intervals(col_width, col_start, matrix.cols.length),
            tuple(sizes),
        )
