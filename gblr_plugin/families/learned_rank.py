"""Low-rank layers whose rank is learned: each component is on or off as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import GBLRConv1d, GBLRConv2d, GBLRLayer, GBLRLinear
from ..structure import StructuredMatrix
from ..swap import structured_like, weight_matrix
from .low_rank import truncated_svd

__all__ = ["LearnedRankConv1d", "LearnedRankConv2d", "LearnedRankLinear", "learned_rank_like"]


class _LearnedRank(GBLRLayer):
    """Masks that are 0 or 1 on a whole axis, with straight-through gradients.

    This is the Gaudi mask of a GBLR layer at its lowest frequency alone: ``G(0) = w``, so ``mask[i] = w`` for every i,
    rounded forward. Its gradient is that of a gate on the component, ``sum_i dLoss/dmask[i]``; intervals cannot form.
    The layer is counted, driven to its budget, frozen and converted as any GBLR layer whose intervals snap to whole
    axes.
    """

    def masks(self) -> tuple[Tensor, Tensor]:
        """Row mask (K, m) and column mask (K, n)."""
        gates = self.widths + (torch.round(self.widths.detach()) - self.widths.detach())
        rows, cols = self.axis_lengths
        return gates[0, :, None].expand(-1, rows), gates[1, :, None].expand(-1, cols)


class LearnedRankLinear(_LearnedRank, GBLRLinear):
    """``nn.Linear`` of learned rank; see :class:`gblr_plugin.GBLRLinear`."""

    structure_name = "low_rank"


class LearnedRankConv1d(_LearnedRank, GBLRConv1d):  # type: ignore[misc]  # as its base
    """``nn.Conv1d`` of learned rank; see :class:`gblr_plugin.GBLRConv1d`."""

    structure_name = "low_rank"


class LearnedRankConv2d(_LearnedRank, GBLRConv2d):  # type: ignore[misc]  # as its base
    """``nn.Conv2d`` of learned rank; see :class:`gblr_plugin.GBLRConv2d`."""

    structure_name = "low_rank"


_KINDS: dict[type, type] = {
    GBLRLinear: LearnedRankLinear,
    GBLRConv1d: LearnedRankConv1d,
    GBLRConv2d: LearnedRankConv2d,
}


def learned_rank_like(dense: nn.Module) -> GBLRLayer:
    """A layer of learned rank in place of a dense one, beginning at its full SVD (more costly than dense).

    Args:
        dense: nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face ``Conv1D``.

    Returns:
        A structured layer for :class:`gblr_plugin.StructureLearner`.
    """
    weight = weight_matrix(dense)
    left, right = truncated_svd(weight.double(), min(weight.shape))
    start = StructuredMatrix.from_factors(left.T.contiguous(), right)
    layer: Any = structured_like(dense, start, align=(weight.shape[0], weight.shape[1]))
    with torch.no_grad():  # all on; at first those of small singular value are nearest to off
        layer.widths.copy_(1 - 0.5 * torch.arange(len(left.T)) / len(left.T))
    layer.__class__ = _KINDS[type(layer)]  # same parameters and buffers, other masks
    return layer  # type: ignore[no-any-return]  # a GBLRLayer
