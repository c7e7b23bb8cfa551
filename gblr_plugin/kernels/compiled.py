"""The compiled product as one torch operator: numba on the CPU, Triton on CUDA, with gradients for x and bias.

The operator is opaque to torch: ``torch.compile`` calls it as it is. Its backward pass is the same operator on the
transposed matrix, for which the tables of row blocks and column blocks are exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .layout import Layout, Sizes
from .soundness import check_operands

__all__ = ["available", "linear", "missing"]

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
_MODULES = {"cpu": "numba", "cuda": "triton"}
WIDEST = 128  # largest block that the Triton kernels take


@lru_cache
def _installed(kind: str) -> bool:
    wanted = os.environ.get("GBLR_COMPILED", "1") != "0"
    return wanted and kind in _MODULES and find_spec(_MODULES[kind]) is not None


@lru_cache
def _has_bfloat16() -> bool:
    from .cpu.processor import abilities  # numba takes a second to import

    return abilities().bfloat16


@torch.compiler.assume_constant_result
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a compiled kernel for this device and dtype.

    It needs numba on the CPU and Triton on CUDA. ``GBLR_COMPILED=0`` in the environment leaves it out.
    """
    if dtype not in _DTYPES.get(device.type, ()) or not _installed(device.type):
        return False
    return device.type != "cpu" or dtype != torch.bfloat16 or _has_bfloat16()


def missing(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a compiled kernel for this device and dtype on other machines, but not on this one."""
    return dtype in _DTYPES.get(device.type, ()) and not available(device, dtype)


@lru_cache
def _kernel(kind: str) -> Callable[..., Tensor]:
    """The kernel of a device type; imported on first use, since numba takes a second to import."""
    if kind == "cuda":
        from .cuda import triton_product as triton_cuda

        return triton_cuda.product
    from .cpu import numba_team

    return numba_team.product


def _scaled(scales: Tensor | None) -> dict[str, Tensor]:
    """The argument of the kernels that know scales."""
    return {} if scales is None else {"scales": scales}


@torch.library.custom_op("gblr_plugin::structured_linear", mutates_args=())
def structured_linear(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    cols_at: int,
    cols: int,
    col_groups_at: int,
    col_width: int,
    rows_at: int,
    rows: int,
    row_groups_at: int,
    row_width: int,
    components: int,
    out_features: int,
    entries: int,
) -> Tensor:
    """``x @ W.T + bias``; see :func:`linear` and :class:`~gblr_plugin.kernels.layout.Sizes`."""
    of_cols, of_rows = (cols_at, cols, col_groups_at, col_width), (rows_at, rows, row_groups_at, row_width)
    sizes = Sizes(*of_cols, *of_rows, components, out_features, entries)
    check_operands(x, factors, lists, bias, scales, sizes)
    return _kernel(x.device.type)(x, factors, lists, bias, sizes, **_scaled(scales))


@structured_linear.register_fake
def _(x: Tensor, factors: Tensor, lists: Tensor, bias: Tensor | None, scales: Tensor | None, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], sizes[9])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, lists, _, scales, *sizes = inputs
    ctx.save_for_backward(factors, lists, scales)
    ctx.sizes, ctx.in_features = Sizes(*sizes), x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    factors, lists, scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = structured_linear(grad, factors, lists, None, scales, *ctx.sizes.transposed(ctx.in_features))
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return (grad_x, None, None, grad_bias, *([None] * 12))


structured_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.gblr_plugin.structured_linear)
def _flops(x_shape: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x_shape[0] * int(args[-1])


def fits(layout: Layout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a layout: wide lists and blocks up to 128 on CUDA, even borders for bfloat16 on CPUs."""
    widths = layout.sizes.row_width, layout.sizes.col_width
    if device.type == "cuda":
        return not layout.narrow and max(widths) <= WIDEST
    split_length = layout.shape[1 if layout.transposed else 0] // len(layout.split_sizes)
    return dtype != torch.bfloat16 or not any(size % 2 for size in (*widths, *layout.shape, split_length))


def linear(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    layout: Layout,
    bias: Tensor | None,
    opaque: bool,
    scales: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``x @ W.T + bias`` by the compiled kernel.

    Args:
        x: (tokens, n), on a device and in a dtype for which :func:`available` is true.
        factors: Flat factors.
        lists: int32 index buffer.
        layout: Layout of the buffers; not dense.
        bias: (m,) or None.
        opaque: Call the kernel directly, without torch's dispatcher: no gradients, no tracing, less overhead.
        scales: (components,) float32 of int8 factors; on the CPU, for x in float32.
        options: Options of the opaque kernel (``tiles`` of Triton's).
    """
    if opaque:
        return _kernel(x.device.type)(x, factors, lists, bias, layout.sizes, **_scaled(scales), **options)
    y: Tensor = structured_linear(x, factors, lists, bias, scales, *layout.sizes)
    return y
