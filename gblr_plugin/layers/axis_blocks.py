"""An axis of a layer cut into blocks, each with the list of the components that are active in it.

A component whose interval does not meet a block contributes nothing there. For the exact boxcars of a frozen structure
the result is exact. For smooth masks, mask values below ``TOLERANCE`` are taken for zero, and so are mask derivatives
below ``SLOPE_TOLERANCE`` times the largest one, which multiply the gradients of widths and locations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..matrix.gaudi_mask import mask_tables

__all__ = ["Block", "MaskedAxis", "active_blocks", "mask_reach"]

TOLERANCE = 1e-5
"""Largest mask value that may be taken for zero."""

SLOPE_TOLERANCE = 1e-3
"""Largest weight in width and location gradients, over the largest one, that may be taken for zero."""


@lru_cache(maxsize=32)
def mask_reach(n: int, sigma: float | None) -> int:
    """Number of samples beyond an interval after which its mask and the mask's gradients are negligible.

    Args:
        n: Axis length N.
        sigma: Smoothness; ``None`` for the exact boxcar, whose straight-through gradients reach everywhere.

    Returns:
        In [1, N]; N where no bound holds. A mask is its boxcar plus one term per edge, read from the tables.
    """
    if sigma is None:
        return n
    smooth, exact = mask_tables(n, sigma, torch.float64), mask_tables(n, None, torch.float64)
    deviation = smooth[0, -n:] - exact[0, -n:]
    deviation = (deviation - deviation[n // 2]).abs()  # the terms' common constant cancels between the edges
    slope = smooth[1, :n].abs()
    distance = torch.arange(n)
    distance = torch.minimum(distance, n - distance)
    beyond = distance[(deviation > TOLERANCE / 2) | (slope > SLOPE_TOLERANCE * slope.max())]
    reach = int(beyond.max()) + 2
    return reach if 2 * reach < n else n


@dataclass(frozen=True, eq=False)
class Block:
    """A range of one axis and the components that are active in it.

    Args:
        components: (A,) int64 indices of the active components, ascending.
        first: First index of the range, on the factor's axis.
        stop: One past its last index.
        offset: Where ``first`` lies on the matrix's axis (row splits are stacked).
    """

    components: Tensor
    first: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Entries of the factor that the block multiplies."""
        return len(self.components) * (self.stop - self.first)


def active_blocks(width: Tensor, start: Tensor, length: int, reach: int, skip: Tensor, splits: int = 1) -> list[Block]:
    """Cut an axis into blocks and list the components that are active in each.

    Args:
        width: (K,) int64 interval widths.
        start: (K,) int64 first indices.
        length: Axis length.
        reach: Samples by which masks exceed their intervals, see :func:`mask_reach`; 0 for frozen boxcars.
        skip: (K,) bool, components to leave out.
        splits: Number of equal runs of components, each with an axis of its own.

    Returns:
        Blocks in the order of the matrix's axis; together they cover it.
    """
    size = min(max(64, length // 8), 192)
    edges = [*range(0, length, size), length]
    first = torch.tensor(edges[:-1], device=width.device)[:, None]
    stop = torch.tensor(edges[1:], device=width.device)[:, None]
    reached = (width + 2 * reach).clamp(max=length)
    begin = start - reach
    # Two cyclic ranges meet if one begins inside the other.
    active = ((first - begin) % length < reached) | ((begin - first) % length < stop - first)
    active &= (reached > 0) & ~skip
    per_split = active.view(len(edges) - 1, splits, -1).transpose(0, 1)  # (splits, blocks, K / splits)
    counts = per_split.sum(-1).flatten().tolist()
    split, _, local = per_split.nonzero(as_tuple=True)
    lists = (local + split * per_split.shape[-1]).split(counts)
    return [
        Block(lists[s * (len(edges) - 1) + b], edges[b], edges[b + 1], s * length + edges[b])
        for s in range(splits)
        for b in range(len(edges) - 1)
    ]


@dataclass(frozen=True, eq=False)
class MaskedAxis:
    """One axis of a layer: its blocks, and the values from which the masks of its components are made.

    Args:
        blocks: From :func:`active_blocks`.
        tables: (2, 3N) from :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`.
        width: (K,) int64 interval widths.
        start: (K,) int64 first indices.
    """

    blocks: list[Block]
    tables: Tensor
    width: Tensor
    start: Tensor

    @cached_property
    def size(self) -> int:
        """Factor entries that all blocks multiply."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """Components of all blocks, (sum A,) int64, and (blocks, 3) int64 first index, stop and A of each."""
        table = torch.tensor([(block.first, block.stop, len(block.components)) for block in self.blocks])
        return torch.cat([block.components for block in self.blocks]), table

    def views(self, flat: Tensor) -> list[Tensor]:
        """The (A, B) entries of each block in a (size,) buffer that holds them one after another."""
        pieces = flat.split([block.size for block in self.blocks])
        return [piece.view(-1, block.stop - block.first) for piece, block in zip(pieces, self.blocks, strict=True)]

    def _windows(self, table: Tensor, block: Block, at: Tensor) -> Tensor:
        """(A, B) table entries of a block's range for intervals that end or begin ``at``."""
        n, size = table.shape[0] // 3, block.stop - block.first
        view = table.as_strided((3 * n - size + 1, size), (1, 1), table.storage_offset())
        return view.index_select(0, (2 * n + block.first) - at.index_select(0, block.components))

    def mask(self, block: Block) -> Tensor:
        """(A, B) mask values of a block."""
        prefix = self.tables[0]
        return self._windows(prefix, block, self.start).sub_(self._windows(prefix, block, self.start + self.width))

    def edge_sums(self, block: Block, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) sums of ``upstream`` (A, B) against the width derivative at the trailing and at the leading edge."""
        slope = self.tables[1]
        trailing = self._windows(slope, block, self.start + self.width).mul_(upstream).sum(1)
        return trailing, self._windows(slope, block, self.start).mul_(upstream).sum(1)
