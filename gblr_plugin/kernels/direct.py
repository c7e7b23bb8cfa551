"""A direct call from ``F.linear`` to the compiled kernels of a CPU, for inference: microseconds count at few tokens.

:func:`launcher` decides once everything that depends on the weight alone. Each call then checks a few states of torch,
and returns ``None`` unless it is plain inference; the caller then uses :func:`~gblr_plugin.kernels.product.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from . import compiled
from ._compat import autocast_on, dispatch_modes, forward_gradients, functorch_transform, tracing
from .layout import Layout
from .plan import Plan
from .soundness import PLAIN

__all__ = ["Launcher", "launcher"]

Launcher = Callable[[Tensor, Tensor | None], Tensor | None]


def launcher(layout: Layout, plan: Plan, factors: Tensor, lists: Tensor, scales: Tensor | None) -> Launcher | None:
    """A call for products by one weight; ``None`` where the compiled kernel of a CPU never multiplies by it.

    Args:
        layout: Layout of the buffers.
        plan: The kernels.
        factors: Flat factors.
        lists: Index buffer. The addresses of all buffers are kept; the caller checks that they have not changed.
        scales: Scales of int8 factors.

    Returns:
        ``call(x, bias)`` with x (..., n), which returns (..., m), or ``None`` for gradients, tracing, autocast,
        dispatch modes, and other devices, dtypes, strides or kernels.
    """
    dtype = factors.dtype if scales is None else scales.dtype
    names = [name for _, name in plan.kernels]
    if (
        "compiled" not in names
        or layout.dense
        or not factors.is_cpu
        or (scales is not None and dtype != torch.float32)
        or not compiled.available(factors.device, dtype)
        or not compiled.fits(layout, factors.device, dtype)
    ):
        return None
    from .cpu.numba_team import SHARED_TOKENS, kernel_for, run_product  # numba takes a second to import

    (m, n), sizes, narrow = layout.shape, layout.sizes, layout.narrow
    places = (sizes.cols_at, sizes.cols, sizes.rows_at, sizes.rows, sizes.components)
    product, kernel_of, always = kernel_for(dtype, scales is not None, narrow), plan.kernel, set(names) == {"compiled"}
    buffers = factors.data_ptr(), lists.data_ptr(), *places, 0 if scales is None else scales.data_ptr()
    single, threads, grad_mode = SHARED_TOKENS // max(layout.entries, 1), torch.get_num_threads, torch.is_grad_enabled

    def call(x: Tensor, bias: Tensor | None) -> Tensor | None:
        if (
            type(x) not in PLAIN
            or x.dtype is not dtype
            or not x.is_cpu
            or not x.is_contiguous()
            or dispatch_modes()
            or tracing()
            or autocast_on()
            or functorch_transform() is not None
            or forward_gradients()
        ):
            return None
        shape = x.shape
        if not shape or shape[-1] != n:
            return None
        if bias is not None and (
            type(bias) not in PLAIN or bias.dtype is not dtype or not bias.is_contiguous() or bias.numel() != m
        ):
            return None
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and grad_mode():
            return None
        matrix = len(shape) == 2
        tokens = shape[0] if matrix else prod(shape[:-1])
        if not always and kernel_of(tokens) != "compiled":
            return None
        y = x.new_empty(tokens, m) if matrix else x.new_empty(*shape[:-1], m)
        bias_at = 0 if bias is None else bias.data_ptr()
        if tokens > single and threads() > 1:
            run_product(x, n, 1, tokens, n, factors, lists, places, scales, bias_at, y, narrow)
        else:
            product(x.data_ptr(), n, 1, tokens, n, *buffers, bias_at, y.data_ptr(), m)
        return y

    return call
