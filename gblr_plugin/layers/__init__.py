"""Trainable structured layers: drop-in modules whose weight is a GBLR matrix with learnable intervals.

The factors, widths and locations are plain parameters, so that optimizers, gradient clipping, AMP, ``torch.compile``
and ``state_dict`` work as with any module.
"""

from .base import GBLRLayer
from .convolutions import CONV_ATTRIBUTES, GBLRConv1d, GBLRConv2d
from .linear import GBLRLinear
from .protocol import StructuredLayer

__all__ = ["CONV_ATTRIBUTES", "GBLRConv1d", "GBLRConv2d", "GBLRLayer", "GBLRLinear", "StructuredLayer"]
