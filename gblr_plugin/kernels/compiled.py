"""The compiled product as one torch operator: numba on the CPU, triton on CUDA, with gradients for x and bias.

The operator is opaque to torch, so that ``torch.compile`` keeps it whole. Its backward pass is the same operator on the
transposed matrix: the block tables change places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .layout import Layout

__all__ = ["available", "linear"]

_DTYPES = {"cpu": (torch.float32,)}
_MODULES = {"cpu": "numba"}


@lru_cache
def _installed(kind: str) -> bool:
    return kind in _MODULES and find_spec(_MODULES[kind]) is not None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Is there a compiled kernel for this device and dtype (an optional dependency may be missing)."""
    return dtype in _DTYPES.get(device.type, ()) and _installed(device.type)


@lru_cache
def _kernel(kind: str) -> Callable[..., Tensor]:
    """The kernel of a device type; imported on first use, since numba takes a second to import."""
    from . import numba_cpu

    return numba_cpu.product


@torch.library.custom_op("gblr_plugin::structured_linear", mutates_args=())
def structured_linear(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    bias: Tensor | None,
    cols_at: int,
    cols: int,
    rows_at: int,
    rows: int,
    components: int,
    out_features: int,
    entries: int,
) -> Tensor:
    """``x @ W.T + bias``; see :func:`linear`. ``entries`` is the number of multiply-adds per token."""
    return _kernel(x.device.type)(x, factors, lists, bias, cols_at, cols, rows_at, rows, components, out_features)


@structured_linear.register_fake
def _(x: Tensor, factors: Tensor, lists: Tensor, bias: Tensor | None, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], sizes[5])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, lists, _, *sizes = inputs
    ctx.save_for_backward(factors, lists)
    ctx.sizes, ctx.in_features = sizes, x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    factors, lists = ctx.saved_tensors
    cols_at, cols, rows_at, rows, components, _, entries = ctx.sizes
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = structured_linear(
            grad, factors, lists, None, rows_at, rows, cols_at, cols, components, ctx.in_features, entries
        )
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return (grad_x, None, None, grad_bias, *([None] * 7))


structured_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.gblr_plugin.structured_linear)
def _flops(x_shape: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x_shape[0] * int(args[-1])


def linear(x: Tensor, factors: Tensor, lists: Tensor, layout: Layout, bias: Tensor | None, opaque: bool) -> Tensor:
    """``x @ W.T + bias`` by the compiled kernel.

    Args:
        x: (tokens, n), on a device and in a dtype for which :func:`available` is true.
        factors: Flat factors.
        lists: int32 index buffer.
        layout: Where everything lies; not dense.
        bias: (m,) or None.
        opaque: Call the kernel directly, without torch's dispatcher: no gradients, no tracing, less overhead.
    """
    call = _kernel(x.device.type) if opaque else structured_linear
    sizes = (
        layout.col_table_at,
        len(layout.col_blocks),
        layout.row_table_at,
        len(layout.row_blocks),
        layout.num_components,
        layout.shape[0],
    )
    return call(x, factors, lists, bias, *sizes) if opaque else call(x, factors, lists, bias, *sizes, layout.entries)
