"""An axis cut into nearly equal consecutive parts, and tensors cut and joined accordingly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..structure import Intervals

__all__ = ["Partition", "cut_blocks", "join_blocks"]


@lru_cache(maxsize=256)
def _indices(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (count, size) into the axis plus one zero at its end, and (length,) positions in the flattened parts."""
    part = Partition(length, count)
    offset = torch.arange(part.size)
    starts, sizes = torch.tensor(part.starts)[:, None], torch.tensor(part.sizes)[:, None]
    index = torch.where(offset < sizes, starts + offset, length)
    return index.to(device), (index.flatten() < length).nonzero().flatten().to(device)


@dataclass(frozen=True)
class Partition:
    """``length`` indices in ``count`` consecutive parts whose sizes differ by at most one, the larger ones first.

    Args:
        length: Number of indices.
        count: Number of parts, in [1, length].
    """

    length: int
    count: int

    @property
    def size(self) -> int:
        """Size of the largest part."""
        return -(-self.length // self.count)

    @property
    def sizes(self) -> list[int]:
        """Size of each part."""
        small, larger = divmod(self.length, self.count)
        return [small + (part < larger) for part in range(self.count)]

    @property
    def starts(self) -> list[int]:
        """First index of each part."""
        small, larger = divmod(self.length, self.count)
        return [part * small + min(part, larger) for part in range(self.count)]

    @property
    def even(self) -> bool:
        """Whether all parts are equal."""
        return self.length % self.count == 0

    def split(self, x: Tensor) -> Tensor:
        """(..., length) to (..., count, size), short parts filled with zeros."""
        if self.even:
            return x.unflatten(-1, (self.count, self.size))
        index, _ = _indices(self.length, self.count, x.device)
        return F.pad(x, (0, 1)).index_select(-1, index.flatten()).unflatten(-1, (self.count, self.size))

    def join(self, parts: Tensor) -> Tensor:
        """(..., count, size) to (..., length), the inverse of :meth:`split`."""
        flat = parts.flatten(-2)
        if self.even:
            return flat
        _, position = _indices(self.length, self.count, parts.device)
        return flat.index_select(-1, position)

    def intervals(self, part: Tensor) -> Intervals:
        """The parts with the given (K,) int64 numbers as intervals of the axis."""
        device = part.device
        width, start = torch.tensor(self.sizes, device=device), torch.tensor(self.starts, device=device)
        return Intervals(width[part], start[part], self.length)


def cut_blocks(matrix: Tensor, rows: Partition, cols: Partition) -> Tensor:
    """(m, n) to its (R, C, s, p) blocks, smaller ones filled with zeros."""
    return rows.split(cols.split(matrix).permute(1, 2, 0)).permute(2, 0, 3, 1)


def join_blocks(blocks: Tensor, rows: Partition, cols: Partition) -> Tensor:
    """(R, C, s, p) blocks to the (m, n) matrix, the inverse of :func:`cut_blocks`."""
    return rows.join(cols.join(blocks.transpose(1, 2)).permute(2, 0, 1)).T
