"""The trainable GBLR layers that take the place of convolutions.

The kernel of a convolution is a matrix with one row per output channel.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..matrix.structure import StructuredMatrix
from ..utils.validation import check_tile
from .base import GBLRLayer

__all__ = ["CONV_ATTRIBUTES", "GBLRConv1d", "GBLRConv2d"]

CONV_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
    "_reversed_padding_repeated_twice",
)
"""What ``nn.Conv1d`` and ``nn.Conv2d`` hold besides weight and bias."""


class _GBLRConv(GBLRLayer):
    """Convolutions as c_out x (c_in * prod(kernel)) matrices (paper Sec. 4, MATH: one row per output channel)."""

    bias: Any
    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int

    def __init__(
        self,
        matrix: StructuredMatrix,
        like: nn.Conv1d | nn.Conv2d,
        bias: Tensor | None = None,
        *,
        align: int | tuple[int, int] = 1,
    ) -> None:
        nn.Module.__init__(self)  # not the convolution's: there is no dense weight to allocate
        if like.groups != 1:
            raise ConfigError(f"convolution with groups={like.groups}: only groups=1 can be structured")
        for name in CONV_ATTRIBUTES:
            setattr(self, name, getattr(like, name))
        expected = like.out_channels, like.in_channels * math.prod(like.kernel_size)
        if matrix.shape != expected:
            raise ConfigError(f"convolution: weight matrix must be {expected}, got {matrix.shape}")
        self._init_structure(matrix, check_tile("align", align), matrix.u.dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @property
    def weight(self) -> Tensor:
        """The dense (c_out, c_in, *kernel) weight, computed on demand."""
        return self.to_dense().view(self.out_channels, self.in_channels, *self.kernel_size)

    def _output_positions(self, input: Tensor) -> int:
        conv: Any = self
        spatial = input.shape[-len(self.kernel_size) :]
        positions = math.prod(input.shape[: input.dim() - len(self.kernel_size) - 1])
        for axis, size in enumerate(spatial):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            named = {"same": reach - 1, "valid": 0}
            pad = named[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[axis]
            positions *= max((size + pad - reach) // conv.stride[axis] + 1, 0)
        return positions

    def forward(self, input: Tensor) -> Tensor:
        """The convolution by two factor convolutions or the dense kernel, whichever takes fewer multiply-adds."""
        conv: Any = self
        kernel = (self.in_channels, *self.kernel_size)
        if self.trains_dense_weight:
            same: Tensor = conv._conv_forward(input, self._from_rows_or_columns().view(-1, *kernel), self.bias)
            return same
        u, v = self.masked_factors()
        product = self._choose_product(self._output_positions(input), linear=False)
        if not product.factored:
            weight = self._dense(u, v, product.rows).view(-1, *kernel)
            output: Tensor = conv._conv_forward(input, weight, self.bias)
            return output
        z = conv._conv_forward(input, v.view(-1, *kernel), None)
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        ones = (1,) * len(self.kernel_size)
        # One output channel of split i reads the components of split i: a grouped 1 x 1 convolution.
        s = self.row_splits
        point = u.view(s, -1, u.shape[1]).transpose(1, 2).flatten(0, 1)
        return convolve(z, point.reshape(*point.shape, *ones), self.bias, groups=s)


class GBLRConv1d(_GBLRConv, nn.Conv1d):  # type: ignore[override]  # `weight` is computed, not a parameter
    """``nn.Conv1d`` with a trainable GBLR weight, the (c_out, c_in * k) matrix.

    Args:
        matrix: Start of the weight matrix.
        like: The dense convolution whose geometry is taken over.
        bias: (c_out,) or ``None``.
        align: Tile of rows and columns to which intervals snap.

    Raises:
        ConfigError: If ``groups`` is not 1 or the matrix does not fit.
    """


class GBLRConv2d(_GBLRConv, nn.Conv2d):  # type: ignore[override]  # `weight` is computed, not a parameter
    """``nn.Conv2d`` with a trainable GBLR weight, the (c_out, c_in * kh * kw) matrix; see :class:`GBLRConv1d`."""
