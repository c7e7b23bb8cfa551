"""Kernels by name, and which of them is safe for the call at hand.

``dense`` multiplies by the stored dense matrix; ``blocks`` is torch operations and always possible; ``compiled`` is
numba on a CPU and triton on CUDA, as one operator with gradients. Exported programs and whatever looks into the product (FLOP
counters, functorch, forward-mode gradients) take torch operations whatever the plan says: the former must run without
this package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blocks, compiled
from .layout import Layout, to_dense

__all__ = ["KERNELS", "linear"]

KERNELS = ("dense", "blocks", "compiled")


def _plain(x: Tensor) -> bool:
    """May code that torch cannot see run: no tracing, no dispatch mode (FLOP counters too), no functorch transform."""
    return (
        type(x) is Tensor
        and not torch._C._is_tracing()
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def linear(x: Tensor, factors: Tensor, lists: Tensor, layout: Layout, bias: Tensor | None, kernel: str) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n), by the named kernel where it may run and by torch operations elsewhere.

    Args:
        x: (tokens, n), dtype and device of ``factors``.
        factors: Flat factors, see :class:`~gblr_plugin.kernels.layout.Layout`.
        lists: int32 lists, intervals and block tables.
        layout: Where everything lies.
        bias: (m,) or None.
        kernel: One of :data:`KERNELS`.

    Returns:
        (tokens, m).
    """
    if layout.dense:
        return F.linear(x, to_dense(layout, factors, lists), bias)
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    compiling = torch.compiler.is_compiling()
    plain = not compiling and _plain(x)
    if kernel == "compiled" and compiled.available(x.device, x.dtype) and compiled.fits(layout, x.device):
        if plain:
            return compiled.linear(x, factors, lists, layout, bias, opaque=not gradients)
        if compiling and not torch.compiler.is_exporting():
            return compiled.linear(x, factors, lists, layout, bias, opaque=False)
    if gradients or not plain:
        return blocks.linear(x, factors, lists, layout, bias)
    return blocks.linear_inference(x, factors, lists, layout, bias)
