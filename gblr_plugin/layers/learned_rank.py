"""Low-rank layers whose rank is learned: each component is on or off on both full axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..matrix.structure import StructuredMatrix
from .base import GBLRLayer
from .convolutions import GBLRConv1d, GBLRConv2d
from .dense import structured_like
from .distributed_parameters import full_tensor, write_full_tensor
from .linear import GBLRLinear

__all__ = ["LearnedRankConv1d", "LearnedRankConv2d", "LearnedRankLinear", "learned_rank_like"]


class _LearnedRank(GBLRLayer):
    """A layer whose masks are one number on the full axis, a gate on each component: ``W = sum_k g_k h_k u_k v_k^T``.

    A gate is ``max(0, 2 w - 1)`` for a width w. It is zero for all widths that round to no index of the axis, so that a
    component that is counted as off contributes nothing, and the matrix does not jump when a component is switched off.
    The widths begin such that the gates are the square roots of the relative singular values; the learner's soft
    threshold then shrinks singular values, which is the proximal step of the nuclear norm. Gradients pass through
    closed gates, so that components can reopen. The learner and conversion treat the layer as any GBLR layer whose tile
    is the full matrix.
    """

    structure_name = "low_rank"

    def _gates(self) -> Tensor:
        """(2, K) row and column gates."""
        raw = 2 * self._structure_parameters()[0] - 1
        return raw + (raw.detach().clamp(min=0) - raw.detach())

    def masks(self) -> tuple[Tensor, Tensor]:
        """Row mask (K, m) and column mask (K, n)."""
        gates = self._gates()
        rows, cols = self.axis_lengths
        return gates[0, :, None].expand(-1, rows), gates[1, :, None].expand(-1, cols)

    def masked_factors(self) -> tuple[Tensor, Tensor]:
        """Row factors (K, m) and column factors (K, n) times their gates."""
        row_gate, col_gate = self._gates().unbind()
        return row_gate[:, None].to(self.U.dtype) * self._row_factors(), col_gate[:, None].to(self.V.dtype) * self.V

    def _may_use_blocks(self) -> bool:
        """Only once frozen: the gradient of a closed gate comes from the full axis."""
        return self._mask_state.frozen

    @torch.no_grad()
    def structure(self) -> StructuredMatrix:
        """A copy of the present low-rank matrix, gates multiplied in, without closed components."""
        rows, cols = self.intervals()
        return StructuredMatrix.from_factors(self._gated_row_factors(), full_tensor(self.V), rows, cols).live()

    def _gated_row_factors(self) -> Tensor:
        """(K, m) row factors times both gates of their components."""
        gates = (2 * full_tensor(self.widths) - 1).clamp(min=0).prod(0)
        return full_tensor(self.U) * gates[:, None].to(self.U.dtype)

    @torch.no_grad()
    def freeze_structure(self, widths: Tensor | None = None, *, keep_gradients: bool = False) -> None:
        """Multiply the gates into U and fix them as open or closed, as :meth:`GBLRLayer.freeze_structure`."""
        write_full_tensor(self.U, self._gated_row_factors())
        super().freeze_structure(widths, keep_gradients=keep_gradients)


class LearnedRankLinear(_LearnedRank, GBLRLinear):
    """``nn.Linear`` of learned rank; see :class:`gblr_plugin.GBLRLinear`."""


class LearnedRankConv1d(_LearnedRank, GBLRConv1d):  # type: ignore[override]  # as of GBLRConv1d
    """``nn.Conv1d`` of learned rank; see :class:`gblr_plugin.GBLRConv1d`."""


class LearnedRankConv2d(_LearnedRank, GBLRConv2d):  # type: ignore[override]  # as of GBLRConv2d
    """``nn.Conv2d`` of learned rank; see :class:`gblr_plugin.GBLRConv2d`."""


_KINDS: dict[type, type] = {
    GBLRLinear: LearnedRankLinear,
    GBLRConv1d: LearnedRankConv1d,
    GBLRConv2d: LearnedRankConv2d,
}


def learned_rank_like(dense: nn.Module, weight: Tensor) -> GBLRLayer:
    """Make a layer of learned rank that begins at the full SVD of a weight, which costs more than the dense product.

    Args:
        dense: nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face ``Conv1D``, whose geometry and bias are taken over.
        weight: (m, n) matrix to begin at.

    Returns:
        A structured layer for :class:`gblr_plugin.StructureLearner`.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    scale = values[0].sqrt()
    matrix = StructuredMatrix.from_factors(left.T * scale, right * scale)
    layer: Any = structured_like(dense, matrix, align=(weight.shape[0], weight.shape[1]))
    with torch.no_grad():
        layer.widths.copy_((values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).sqrt() / 2 + 0.5)
    layer.__class__ = _KINDS[type(layer)]  # the same parameters and buffers with other masks
    return layer  # type: ignore[no-any-return]  # a GBLRLayer
