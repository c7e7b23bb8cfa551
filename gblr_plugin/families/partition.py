"""Cut an axis into consecutive parts of nearly equal size, and cut and join tensors accordingly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matrix.structure import Intervals

__all__ = ["Partition", "cut_blocks", "join_blocks"]


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
        return [small + (index < larger) for index in range(self.count)]

    @property
    def starts(self) -> list[int]:
        """First index of each part."""
        small, larger = divmod(self.length, self.count)
        return [index * small + min(index, larger) for index in range(self.count)]

    def split(self, x: Tensor) -> Tensor:
        """(..., length) to (..., count, size), short parts filled with zeros."""
        larger = self.length % self.count or self.count
        head = x[..., : larger * self.size].reshape(*x.shape[:-1], larger, self.size)
        if larger == self.count:
            return head
        tail = x[..., larger * self.size :].reshape(*x.shape[:-1], self.count - larger, self.size - 1)
        return torch.cat([head, F.pad(tail, (0, 1))], dim=-2)

    def join(self, split: Tensor) -> Tensor:
        """(..., count, size) to (..., length), the inverse of :meth:`split`."""
        larger = self.length % self.count or self.count
        if larger == self.count:
            return split.flatten(-2)
        return torch.cat([split[..., :larger, :].flatten(-2), split[..., larger:, :-1].flatten(-2)], dim=-1)

    def intervals(self, index: Tensor) -> Intervals:
        """The parts with the given (K,) int64 numbers as intervals of the axis."""
        device = index.device
        width, start = torch.tensor(self.sizes, device=device), torch.tensor(self.starts, device=device)
        return Intervals(width[index], start[index], self.length)


def cut_blocks(matrix: Tensor, rows: Partition, cols: Partition) -> Tensor:
    """(m, n) to its (R, C, s, p) blocks, smaller ones filled with zeros."""
    return rows.split(cols.split(matrix).permute(1, 2, 0)).permute(2, 0, 3, 1)


def join_blocks(blocks: Tensor, rows: Partition, cols: Partition) -> Tensor:
    """(R, C, s, p) blocks to the (m, n) matrix, the inverse of :func:`cut_blocks`."""
    return rows.join(cols.join(blocks.transpose(1, 2)).permute(2, 0, 1)).T
