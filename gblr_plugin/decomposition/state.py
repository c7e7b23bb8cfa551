"""The state of a pursuit: local blocks and a low-rank part, which each step replaces by better ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .search import Blocks
from .spans import Spans

__all__ = ["State", "norms", "orthonormal"]


@dataclass(frozen=True, eq=False)
class State:
    """K local blocks u_k v_k^T, and bases of a low-rank part, whose coefficients follow by least squares.

    Args:
        u: (K, m) row factors, zero off ``rows``.
        v: (K, n) column factors, zero off ``cols``.
        rows: K intervals of the rows.
        cols: K intervals of the columns.
        left: (m, r), spans the columns of the low-rank part.
        right: (r, n) orthonormal, spans its rows, in whitened coordinates.
        last_v: (K, n) column factors one sweep ago.
        net_gain: (K,) by how much the squared error would grow without each block, less the least gain per multiply-add
            times its multiply-adds; computed when intervals were last chosen.
    """

    u: Tensor
    v: Tensor
    rows: Spans
    cols: Spans
    left: Tensor
    right: Tensor
    last_v: Tensor
    net_gain: Tensor

    def cost(self) -> int:
        """Multiply-adds of the blocks."""
        return int((self.rows.widths() + self.cols.widths()).sum())

    def to(self, dtype: torch.dtype) -> State:
        """The same state in another dtype."""
        names = ("u", "v", "left", "right", "last_v", "net_gain")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def select(self, index: Tensor) -> State:
        """The blocks at ``index`` ((J,) int64 or (K,) bool), and the low-rank part."""
        rows, cols = self.rows.select(index), self.cols.select(index)
        u, v, last_v, net_gain = (each[index] for each in (self.u, self.v, self.last_v, self.net_gain))
        return replace(self, u=u, v=v, last_v=last_v, net_gain=net_gain, rows=rows, cols=cols)

    def live(self, net_gain: Tensor) -> State:
        """The blocks of positive (K,) net gain."""
        state, stays = replace(self, net_gain=net_gain), net_gain > 0
        return state if bool(stays.all()) else state.select(stays)

    def best(self, count: int) -> State:
        """At most ``count`` blocks, those of largest net gain, in their order."""
        if len(self.u) <= count:
            return self
        return self.select(torch.argsort(self.net_gain, descending=True, stable=True)[:count].sort().values)

    def with_blocks(self, blocks: Blocks) -> State:
        """These blocks, then others."""
        return replace(
            self,
            u=torch.cat([self.u, blocks.u]),
            v=torch.cat([self.v, blocks.v]),
            last_v=torch.cat([self.last_v, blocks.v]),
            net_gain=torch.cat([self.net_gain, blocks.v.new_zeros(len(blocks.v))]),
            rows=self.rows.join(blocks.rows),
            cols=self.cols.join(blocks.cols),
        )


def norms(rows: Tensor) -> Tensor:
    """(K, 1) norms of (K, N) rows, none of them zero."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return found.clamp(min=1e-30)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis, (N, r), of what (N, r) columns span."""
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
