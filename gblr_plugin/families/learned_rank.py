"""Low-rank layers whose rank is learned: each component is on or off as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import GBLRConv1d, GBLRConv2d, GBLRLayer, GBLRLinear
from ..layers.dense import structured_like, weight_matrix
from ..layers.distributed_parameters import whole, write_whole
from ..matrix.structure import StructuredMatrix

__all__ = ["LearnedRankConv1d", "LearnedRankConv2d", "LearnedRankLinear", "learned_rank_like"]


class _LearnedRank(GBLRLayer):
    """Masks that are one number on a whole axis, a gate on each component: ``W = sum_k g_k h_k u_k v_k^T``.

    A gate is ``max(0, 2 w - 1)`` for a width w, so that it reaches zero where the width rounds from the whole axis to
    none: what is counted as off contributes nothing, and goes off without a jump. Beginning at the square roots of the
    relative singular values, the learner's soft threshold shrinks singular values, the proximal step of the nuclear
    norm. Gradients pass through closed gates, so that components can come back. Counted, driven to its budget and
    converted as any GBLR layer whose intervals snap to whole axes.
    """

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

    def _blocks_allowed(self) -> bool:
        """Only once frozen: the gradient of a closed gate comes from the whole axis."""
        return self._structure_frozen

    @torch.no_grad()
    def structure(self) -> StructuredMatrix:
        """A copy of the present low-rank matrix, gates multiplied in, without closed components."""
        rows, cols = self.intervals()
        u = whole(self.U) * self._whole_gates()
        return StructuredMatrix.from_factors(u, whole(self.V), rows, cols).live()

    def _whole_gates(self) -> Tensor:
        """(K, 1) products of both gates, in the dtype of the factors."""
        return (2 * whole(self.widths) - 1).clamp(min=0).prod(0)[:, None].to(self.U.dtype)

    @torch.no_grad()
    def freeze_structure(self, whole_widths: Tensor | None = None, *, attached: bool = False) -> None:
        """Multiply the gates into U and fix them as open or closed, as :meth:`GBLRLayer.freeze_structure`."""
        write_whole(self.U, whole(self.U) * self._whole_gates())
        super().freeze_structure(whole_widths, attached=attached)


class LearnedRankLinear(_LearnedRank, GBLRLinear):
    """``nn.Linear`` of learned rank; see :class:`gblr_plugin.GBLRLinear`."""

    structure_name = "low_rank"


class LearnedRankConv1d(_LearnedRank, GBLRConv1d):
    """``nn.Conv1d`` of learned rank; see :class:`gblr_plugin.GBLRConv1d`."""

    structure_name = "low_rank"


class LearnedRankConv2d(_LearnedRank, GBLRConv2d):
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
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    scale = values[0].sqrt()
    start = StructuredMatrix.from_factors(left.T * scale, right * scale)
    layer: Any = structured_like(dense, start, align=(weight.shape[0], weight.shape[1]))
    with torch.no_grad():
        layer.widths.copy_((values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).sqrt() / 2 + 0.5)
    layer.__class__ = _KINDS[type(layer)]  # same parameters and buffers, other masks
    return layer  # type: ignore[no-any-return]  # a GBLRLayer
