"""Modules of small frozen weights: they take the matrix that such a weight keeps before torch sees the weight.

Torch takes microseconds to find out that a weight is a tensor subclass, longer than a small product.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import wrap
from torch.nn.functional import linear

__all__ = ["FROZEN", "FrozenConv1d", "FrozenConv2d", "FrozenLinear", "hasten"]


ALWAYS = ((-1.0, float("inf")),)
"""What ``dense_elements`` of a weight is where every input takes the dense matrix."""


def _direct(weight: Any, input: Tensor) -> Any:
    """What to multiply by: the weight, or the dense matrix that it keeps for this many tokens."""
    matrix = getattr(weight, "matrix", None)  # a weight that was put in its place has none
    if matrix is None:
        return weight
    spans = weight.dense_elements
    if spans is ALWAYS:
        return matrix
    if not is_compiling():  # a trace must not ask how many tokens there are
        elements = input.numel()
        for above, to in spans:
            if above < elements <= to:
                return matrix
    return weight


wrap("_direct")  # a symbolic trace calls it, and asks for no number of tokens


class FrozenLinear(nn.Linear):
    """A converted linear layer whose weight keeps its dense matrix, for some or all numbers of tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        own = self._parameters  # to ask the module for them takes a tenth of a small product
        weight: Any = own.get("weight")
        bias = own.get("bias")
        if weight is None:  # in another form, as parametrizations leave it
            weight = self.weight
        return linear(input, _direct(weight, input), self.bias if bias is None else bias)


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
FROZEN = (FrozenLinear, FrozenConv1d, FrozenConv2d)


def hasten(module: nn.Module) -> nn.Module:
    """Give a module whose weight keeps its matrix the class that makes use of it; returns the module."""
    if type(module) in _FAST and getattr(module._parameters.get("weight"), "matrix", None) is not None:
        module.__class__ = _FAST[type(module)]
    return module
