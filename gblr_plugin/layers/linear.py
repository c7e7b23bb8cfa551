"""The trainable GBLR layer that takes the place of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..matrix.structure import StructuredMatrix
from ..utils.validation import check_tile
from .axis_blocks import MaskedAxis
from .base import GBLRLayer
from .blockwise import block_linear

__all__ = ["GBLRLinear"]


class GBLRLinear(GBLRLayer, nn.Linear):
    """A linear layer ``y = x W^T + b`` with a trainable GBLR weight, in place of ``nn.Linear`` and HF ``Conv1D``.

    Args:
        matrix: Start of the (out_features, in_features) weight.
        bias: (out_features,) or ``None``.
        align: Tile of rows and columns to which intervals snap.
        dtype: Dtype of the factors; default that of ``matrix``.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    def __init__(
        self,
        matrix: StructuredMatrix,
        bias: Tensor | None = None,
        *,
        align: int | tuple[int, int] = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there is no dense weight to allocate
        self.out_features, self.in_features = matrix.shape
        self._init_structure(matrix, check_tile("align", align), dtype or matrix.u.dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear's parameter, here computed
        """The dense (m, n) weight, computed on demand."""
        return self.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b`` by the factored product or the dense reconstruction, whichever takes fewer multiply-adds."""
        if self.trains_dense_weight:
            return F.linear(input, self._from_rows_or_columns(), self.bias)
        product = self._choose_product(input.numel() // max(self.in_features, 1), linear=True)
        if product.rows is not None and product.cols is not None:
            return self._block_linear(input, product.rows, product.cols)
        u, v = self.masked_factors()
        if not product.factored:
            return F.linear(input, self._dense(u, v, product.rows), self.bias)
        z = F.linear(input, v)
        if self.row_splits == 1:
            return F.linear(z, u.T, self.bias)
        s = self.row_splits
        splits = torch.einsum("...sk,skm->...sm", z.unflatten(-1, (s, -1)), u.view(s, -1, u.shape[1]))
        y = splits.flatten(-2)
        return y if self.bias is None else y + self.bias

    def _block_linear(self, input: Tensor, rows: MaskedAxis, cols: MaskedAxis) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return block_linear(
                input, self._row_factors(), self.V, *self._structure_parameters(), self.bias, rows, cols
            )
