"""Modules for small frozen weights, which multiply by the dense matrix that such a weight keeps beside its factors.

They pass the matrix, and not the weight, to torch: torch needs microseconds to dispatch on a tensor subclass, which is
longer than a small product takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import wrap
from torch.nn.functional import linear

__all__ = ["FROZEN", "FrozenConv1d", "FrozenConv2d", "FrozenLinear", "use_kept_matrix"]


ALWAYS = ((-1.0, float("inf")),)
"""The ``dense_elements`` of a weight that multiplies every input by the dense matrix."""


def _direct(weight: Any, input: Tensor) -> Any:
    """The weight, or the dense matrix that it keeps for this many tokens."""
    matrix = getattr(weight, "matrix", None)  # a plain tensor in place of the frozen weight has none
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


wrap("_direct")  # symbolic traces call the function as it is, and do not ask for the number of tokens


class FrozenLinear(nn.Linear):
    """A converted linear layer whose weight keeps its dense matrix, for some or all numbers of tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        parameters = self._parameters  # attributes of a module take a tenth of the time of a small product
        weight: Any = parameters.get("weight")
        bias = parameters.get("bias")
        if weight is None:  # in another form, as parametrizations leave it
            weight = self.weight
        return linear(input, _direct(weight, input), self.bias if bias is None else bias)


class FrozenConv1d(nn.Conv1d):
    """A converted convolution whose weight keeps its dense matrix."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, _direct(weight, input), bias)
        return y


class FrozenConv2d(nn.Conv2d):
    """A converted convolution over two axes whose weight keeps its dense matrix."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, _direct(weight, input), bias)
        return y


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FrozenLinear,
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
}
FROZEN = (FrozenLinear, FrozenConv1d, FrozenConv2d)


def use_kept_matrix(module: nn.Module) -> nn.Module:
    """Give a module whose weight keeps its dense matrix the class that uses the matrix; returns the module."""
    if type(module) in _FAST and getattr(module._parameters.get("weight"), "matrix", None) is not None:
        module.__class__ = _FAST[type(module)]
    return module
