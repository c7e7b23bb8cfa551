"""The short way from ``F.linear`` to the compiled CPU kernel, for inference: microseconds count at one token.

What depends on the weight alone is decided once (:func:`launcher`); what depends on the call is asked of torch in a
handful of questions. Whatever is not plain inference gets None for an answer, and takes the long way
(:func:`~gblr_plugin.kernels.product.linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import compiled
from .layout import Layout
from .plan import Plan

__all__ = ["Launcher", "launcher"]

_PLAIN = (Tensor, Parameter)

Launcher = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor | None]


def launcher(layout: Layout, plan: Plan, factors: Tensor, scales: Tensor | None) -> Launcher | None:
    """A call for products by one weight, None where its plan or its device never takes the compiled CPU kernel.

    Args:
        layout: Where everything lies.
        plan: The kernels.
        factors: Flat factors: device and dtype count; the buffers to multiply by come with each call.
        scales: Of int8 factors.

    Returns:
        ``call(x, factors, lists, scales, bias)`` with x (..., n), which gives (..., m), or None where the call needs
        the long way: gradients, tracing, autocast, dispatch modes, other devices, dtypes, strides or kernels.
    """
    dtype = factors.dtype if scales is None else scales.dtype
    if (
        layout.dense
        or type(factors) is not Tensor
        or not factors.is_cpu
        or (scales is not None and dtype != torch.float32)
        or not compiled.available(factors.device, dtype)
        or not compiled.fits(layout, factors.device, dtype)
    ):
        return None
    tokens_of_compiled = [limit for limit, kernel in plan.kernels if kernel == "compiled"]
    if not tokens_of_compiled:
        return None
    from .numba_team import WORTH_THREADS, kernel_for, run_product  # numba takes a second to import

    m, n = layout.shape
    places = (
        layout.col_table_at,
        len(layout.col_blocks),
        layout.row_table_at,
        len(layout.row_blocks),
        layout.num_components,
    )
    always, kernel_of, narrow = len(tokens_of_compiled) == len(plan.kernels), plan.kernel, layout.narrow
    run, alone = kernel_for(dtype, scales is not None, layout.narrow), WORTH_THREADS // max(layout.entries, 1)
    is_tracing, autocast, dispatch_modes = (
        torch._C._is_tracing,
        torch._C._is_any_autocast_enabled,
        torch._C._len_torch_dispatch_stack,
    )
    functorch, grad_mode = torch._C._functorch.peek_interpreter_stack, torch.is_grad_enabled
    threads = torch.get_num_threads

    def call(x: Tensor, factors: Tensor, lists: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if (
            type(x) not in _PLAIN
            or x.dtype is not dtype
            or not x.is_cpu
            or not x.is_contiguous()
            or dispatch_modes()
            or is_tracing()
            or autocast()
            or functorch() is not None
            or forward_ad._current_level >= 0
        ):
            return None
        shape = x.shape
        if not shape or shape[-1] != n:
            return None
        bias_at = 0
        if bias is not None:
            if type(bias) not in _PLAIN or bias.dtype is not dtype or not bias.is_contiguous() or bias.numel() != m:
                return None
            bias_at = bias.data_ptr()
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and grad_mode():
            return None
        tokens = shape[0] if len(shape) == 2 else prod(shape[:-1])
        if not always and kernel_of(tokens) != "compiled":
            return None
        y = x.new_empty(tokens, m) if len(shape) == 2 else x.new_empty(*shape[:-1], m)
        if tokens > alone and threads() > 1:
            run_product(x, n, 1, tokens, n, factors, lists, places, scales, bias_at, y, narrow)
            return y
        at = (x.data_ptr(), n, 1, tokens, n, factors.data_ptr(), lists.data_ptr())
        run(*at, *places, 0 if scales is None else scales.data_ptr(), bias_at, y.data_ptr(), m)
        return y

    return call
