"""Tiles: intervals begin and end at multiples of a tile of rows and a tile of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .structure import Intervals

__all__ = ["TiledAxis"]


@dataclass(frozen=True)
class TiledAxis:
    """An axis of ``length`` indices cut into cells of ``tile`` indices, at which intervals begin and end.

    The last cell is short where the tile does not divide the length; intervals then do not wrap, and one that contains
    the last cell is as wide as whole tiles (its excess wraps), so that every width is a multiple of the tile or the
    whole axis.
    """

    length: int
    tile: int

    @property
    def cells(self) -> int:
        """Number of cells, the last one possibly short."""
        return -(-self.length // self.tile)

    @property
    def cyclic(self) -> bool:
        """Whether intervals of cells may wrap around."""
        return self.length % self.tile == 0

    def widths(self, cells: Tensor) -> Tensor:
        """Number of indices, int64, covered by intervals of so many cells."""
        return (cells * self.tile).clamp(max=self.length)

    def intervals(self, cells: Tensor, start: Tensor) -> Intervals:
        """Intervals of ``cells`` cells from cell ``start``; both (K,) int64."""
        width = self.widths(cells)
        begin = torch.where((width > 0) & (width < self.length), start * self.tile, torch.zeros_like(start))
        return Intervals.of_known(width, begin % self.length, self.length)

    def trailing(self, num_components: int, device: torch.device | None = None) -> Intervals:
        """Component k on the indices from k to the end, its start moved down to a multiple of the tile.

        Components past the end have width 0.
        """
        index = torch.arange(num_components, dtype=torch.int64, device=device) // self.tile
        return self.intervals((self.cells - index).clamp(min=0), index.clamp(max=self.cells - 1))
