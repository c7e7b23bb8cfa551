"""Modules of small frozen weights: they take the matrix that such a weight keeps before torch sees the weight.

Torch takes microseconds to find out that a weight is a tensor subclass, longer than a small product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FrozenConv1d", "FrozenConv2d", "FrozenLinear", "hasten"]


def _direct(weight: Any, input: Tensor) -> Any:
    """What to multiply by: the weight, or the dense matrix that it keeps for this many tokens."""
    matrix: Tensor | None = getattr(weight, "matrix", None)  # none has a weight that was put in its place
    if matrix is None:
        return weight
    limit: int | None = weight.dense_elements
    if torch.compiler.is_compiling():  # a trace must not ask how many tokens there are
        return weight if limit is not None or torch.compiler.is_exporting() else matrix
    if torch._C._len_torch_dispatch_stack() or (limit is not None and input.numel() > limit):
        return weight  # counters of FLOPs see the structure
    return matrix


class FrozenLinear(nn.Linear):
    """A converted linear layer whose weight keeps its dense matrix, for some or all numbers of tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return F.linear(input, _direct(self.weight, input), self.bias)


class FrozenConv1d(nn.Conv1d):
    """The same for a convolution."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, _direct(weight, input), bias)
        return y


class FrozenConv2d(nn.Conv2d):
    """The same for a convolution over two axes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, _direct(weight, input), bias)
        return y


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FrozenLinear,
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
}


def hasten(module: nn.Module) -> nn.Module:
    """Give a module whose weight keeps its matrix the class that makes use of it; returns the module."""
    if type(module) in _FAST and getattr(module._parameters.get("weight"), "matrix", None) is not None:
        module.__class__ = _FAST[type(module)]
    return module
