"""Kernels by name, and which of them is safe for the call at hand.

``dense`` multiplies by the stored dense matrix; ``blocks`` is torch operations and always possible; ``compiled`` is numba on a
CPU and triton on CUDA. Traced programs and calls that need gradients take torch operations whatever the plan says: an
exported program must run without this package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blocks
from .layout import Layout, to_dense

__all__ = ["KERNELS", "linear"]

KERNELS = ("dense", "blocks", "compiled")


def _opaque_allowed(x: Tensor) -> bool:
    """May code that torch cannot see run: no tracing, no dispatch mode (FLOP counters too), no functorch transform."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]  # untyped in torch
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def linear(x: Tensor, values: Tensor, index: Tensor, layout: Layout, bias: Tensor | None, kernel: str) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n), by the named kernel where it may run and by torch operations elsewhere.

    Args:
        x: (tokens, n), dtype and device of ``values``.
        values: Flat factors, see :class:`~gblr_plugin.kernels.layout.Layout`.
        index: int32 lists and intervals.
        layout: Where everything lies.
        bias: (m,) or None.
        kernel: One of :data:`KERNELS`.

    Returns:
        (tokens, m).
    """
    if layout.dense:
        return F.linear(x, to_dense(layout, values, index), bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return blocks.linear(x, values, index, layout, bias)
    if torch.compiler.is_compiling() or not _opaque_allowed(x):
        return blocks.linear(x, values, index, layout, bias)
    return blocks.linear_inference(x, values, index, layout, bias)
