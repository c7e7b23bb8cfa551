"""A direct call from ``F.linear`` to the kernels of a CPU, for inference with few tokens, where microseconds count.

:func:`launcher` decides once what depends on the weight alone. Each call then asks torch a few questions, and returns
``None`` for all that is not plain inference, which goes through :func:`~gblr_plugin.kernels.product.linear` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from . import blocks, compiled
from ._compat import autocast_on, dispatch_modes, forward_gradients, functorch_transform, tracing
from .layout import Layout
from .plan import Plan
from .soundness import PLAIN

__all__ = ["Launcher", "launcher"]

Launcher = Callable[[Tensor, Tensor | None], Tensor | None]


def launcher(layout: Layout, plan: Plan, factors: Tensor, lists: Tensor, scales: Tensor | None) -> Launcher | None:
    """A call for products by one weight; ``None`` where its plan never takes the factors or its device is no CPU.

    Args:
        layout: Where everything lies.
        plan: The kernels.
        factors: Flat factors.
        lists: Index buffer. The addresses of all buffers are kept; the caller checks that they have not changed.
        scales: Scales of int8 factors.

    Returns:
        ``call(x, bias)`` with x (..., n), which returns (..., m), or ``None`` for gradients, tracing, autocast,
        dispatch modes, and other devices, dtypes, strides or kernels.
    """
    dtype = factors.dtype if scales is None else scales.dtype
    names = {name for _, name in plan.kernels} - {"dense"}
    if layout.dense or not names or not factors.is_cpu:
        return None
    has_compiled = (
        (scales is None or dtype == torch.float32)
        and compiled.available(factors.device, dtype)
        and compiled.fits(layout, factors.device, dtype)
    )
    if has_compiled and "compiled" in names:
        names, run = {"compiled"}, _compiled(layout, dtype, factors, lists, scales)
    else:
        run = _blocks(layout, factors, lists, scales)
    m, n = layout.shape
    always, kernel_of = all(name in names for _, name in plan.kernels), plan.kernel
    grad_mode = torch.is_grad_enabled

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
        tokens = shape[0] if len(shape) == 2 else prod(shape[:-1])
        if not always and kernel_of(tokens) not in names:
            return None
        return run(x, tokens, bias)

    return call


_Run = Callable[[Tensor, int, Tensor | None], Tensor]


def _compiled(layout: Layout, dtype: torch.dtype, factors: Tensor, lists: Tensor, scales: Tensor | None) -> _Run:
    from .cpu.numba_team import SHARED_TOKENS, kernel_for, run_product  # numba takes a second to import

    m, n = layout.shape
    sizes = layout.sizes
    places = (sizes.cols_at, sizes.cols, sizes.rows_at, sizes.rows, sizes.components)
    product, narrow = kernel_for(dtype, scales is not None, layout.narrow), layout.narrow
    buffers = factors.data_ptr(), lists.data_ptr(), *places, 0 if scales is None else scales.data_ptr()
    alone, threads = SHARED_TOKENS // max(layout.entries, 1), torch.get_num_threads

    def run(x: Tensor, tokens: int, bias: Tensor | None) -> Tensor:
        y = x.new_empty(tokens, m) if x.dim() == 2 else x.new_empty(*x.shape[:-1], m)
        bias_at = 0 if bias is None else bias.data_ptr()
        if tokens > alone and threads() > 1:
            run_product(x, n, 1, tokens, n, factors, lists, places, scales, bias_at, y, narrow)
            return y
        product(x.data_ptr(), n, 1, tokens, n, *buffers, bias_at, y.data_ptr(), m)
        return y

    return run


def _blocks(layout: Layout, factors: Tensor, lists: Tensor, scales: Tensor | None) -> _Run:
    m, n = layout.shape

    def run(x: Tensor, tokens: int, bias: Tensor | None) -> Tensor:
        with torch.no_grad():  # results are written in place
            y = blocks.linear_inference(x.view(tokens, n), factors, lists, layout, bias, scales)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], m)

    return run
