"""Converted layers that are stored dense: their structure cost at least as much as the dense product.

They compute what a plain layer computes. Their type tells a report, a file and a second compression what they are.
"""

from __future__ import annotations

from torch import nn

__all__ = ["FULL", "FullConv1d", "FullConv2d", "FullLinear", "as_full"]


class FullLinear(nn.Linear):
    """A converted linear layer whose weight is stored dense."""


class FullConv1d(nn.Conv1d):
    """A converted ``nn.Conv1d`` whose weight is stored dense."""


class FullConv2d(nn.Conv2d):
    """A converted ``nn.Conv2d`` whose weight is stored dense."""


FULL = (FullLinear, FullConv1d, FullConv2d)
_FULL_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FullLinear,
    nn.Conv1d: FullConv1d,
    nn.Conv2d: FullConv2d,
}


def as_full(module: nn.Module) -> nn.Module:
    """Give a plain layer the class of those that are stored dense; returns the module."""
    module.__class__ = _FULL_OF.get(type(module), type(module))
    return module
