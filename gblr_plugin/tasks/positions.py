"""A convolution written as one matrix per position of its kernel, each of which can have a structure of its own.

The published form takes a kernel as one c_out x (c_in * kh * kw) matrix, whose columns belong to all positions at once.
Here the kernel is the sum of kh * kw convolutions of size 1 over shifted inputs: the same function at the same cost.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..layers.dense import replace_modules

__all__ = ["KernelPositions", "split_kernel_positions"]


class KernelPositions(nn.Module):
    """A convolution as a sum over the positions of its kernel, starting from the weights of a dense one.

    Args:
        convolution: Without groups, with zero padding.

    Raises:
        ConfigError: For any other convolution.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        padding = convolution.padding
        if convolution.groups != 1 or convolution.padding_mode != "zeros" or isinstance(padding, str):
            raise ConfigError("kernel positions: need a convolution with groups=1 and zero padding given in numbers")
        self.kernel_size: tuple[int, int] = convolution.kernel_size  # type: ignore[assignment]  # two axes
        self.stride, self.dilation, self.padding = convolution.stride, convolution.dilation, padding
        weight = convolution.weight.detach()
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.positions = nn.ModuleList()
        for index in range(math.prod(self.kernel_size)):
            row, column = divmod(index, self.kernel_size[1])
            bias = convolution.bias if index == 0 else None
            channels = convolution.in_channels, convolution.out_channels
            pointwise = nn.Conv2d(*channels, 1, bias=bias is not None, **options)
            with torch.no_grad():
                pointwise.weight.copy_(weight[:, :, row, column, None, None])
                if bias is not None and pointwise.bias is not None:
                    pointwise.bias.copy_(bias)
            self.positions.append(pointwise)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, H, W) to (batch, c_out, H', W'), as the convolution."""
        x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(
                x.shape[2:], self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        total: Tensor | None = None
        for index, pointwise in enumerate(self.positions):
            top, left = (a * b for a, b in zip(divmod(index, self.kernel_size[1]), self.dilation, strict=True))
            down, along = self.stride
            shifted = x[:, :, top : top + (height - 1) * down + 1 : down, left : left + (width - 1) * along + 1 : along]
            total = pointwise(shifted) if total is None else total + pointwise(shifted)
        assert total is not None  # a kernel has at least one position
        return total


def split_kernel_positions(model: nn.Module) -> None:
    """Write every convolution of a model with a kernel above 1 x 1 as a sum over its positions, in place."""
    chosen = [module for module in model.modules() if type(module) is nn.Conv2d and math.prod(module.kernel_size) > 1]
    replace_modules(model, {id(module): KernelPositions(module) for module in chosen})
