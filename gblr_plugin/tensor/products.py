"""Products by a frozen weight: ``F.linear``, ``F.conv1d`` and ``F.conv2d``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, GBLRError
from ..kernels import product
from ..kernels.buffers import to_dense
from ..kernels.plan import BUCKETS
from ._compat import is_in_torch_dispatch_mode
from .weight import Checked, Weight, checked

__all__ = ["convolution", "direct_linear", "linear"]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Dtype in which autocast would run a dense product of x; ``None`` where it would leave x alone."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else None


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def _operands(x: Tensor, weight: Weight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, factors, scales and bias in one dtype, autocast's where it is on; int8 factors stay int8."""
    factors, scales, dtype = weight.factors, weight.scales, _autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        factors, scales = (factors.to(dtype), None) if scales is None else (factors, scales.to(dtype))
    expected = factors.dtype if scales is None else scales.dtype
    if x.dtype != expected or (bias is not None and bias.dtype != x.dtype):
        raise GBLRError(
            f"GBLR tensor: input, weight and bias must share one dtype, got {x.dtype}, {expected}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    return x, factors, scales, bias


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for x (..., n), by the kernel that the plan names for as many tokens."""
    checked(weight)
    m, n = weight.packing.shape
    if x.shape[-1] != n:
        raise GBLRError(f"GBLR tensor: input of shape {tuple(x.shape)} does not fit a {m} x {n} weight")
    if bias is not None and bias.shape != (m,):
        raise GBLRError(f"GBLR tensor: bias of shape {tuple(bias.shape)} does not fit a {m} x {n} weight")
    rows, factors, scales, bias = _operands(x.reshape(-1, n), weight, bias)
    # A trace with a dynamic batch must not ask how many tokens there are.
    tokens = BUCKETS[-1] if torch.compiler.is_compiling() else rows.shape[0]
    kernel = weight.plan.kernel(tokens)
    if kernel == "dense" and weight.matrix is not None and not is_in_torch_dispatch_mode():
        return F.linear(x, weight.matrix, bias)
    with _no_autocast(x):
        y = product.linear(rows, factors, weight.lists, weight.packing, bias, kernel, scales)
    return y.view(*x.shape[:-1], m)


def direct_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor | None:
    """The product without torch's dispatcher, where nothing but the result is wanted; ``None`` where more may be."""
    checks = weight._checks
    if type(checks) is not Checked or not checks.holds():
        checks = checked(weight)
        if checks is None:
            return None
    if checks.call is not None:
        return checks.call(x, bias)
    if checks.scales is None and weight.packing.dense and type(x) is Tensor and x.dtype is checks.factors.dtype:
        return F.linear(x, to_dense(weight.packing, checks.factors, checks.lists), bias)
    return None


def _per_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def convolution(
    function: Any,
    input: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d`` or ``F.conv2d`` (``function``) with a frozen weight; the other arguments are those of torch."""
    dims = 1 if function is F.conv1d else 2
    if groups != 1:
        raise ConfigError(f"GBLR tensor: convolutions need groups=1, got {groups}")
    if len(weight.outer_shape) != dims + 2 or input.shape[-dims - 1] != weight.outer_shape[1]:
        raise GBLRError(
            f"GBLR tensor: input {tuple(input.shape)} does not fit a convolution weight {weight.outer_shape}"
        )
    checked(weight)
    x, factors, scales, bias = _operands(input, weight, bias)
    padding = padding if isinstance(padding, str) else _per_axis(padding, dims)
    options = _per_axis(stride, dims), padding, _per_axis(dilation, dims)
    batched = x.dim() == dims + 2
    x = x if batched else x.unsqueeze(0)
    layout, shape, kernel = weight.packing, weight.outer_shape, weight.plan.kernels[-1][1]
    with _no_autocast(input):
        if layout.dense:
            dense = to_dense(layout, factors, weight.lists, scales).reshape(shape)
            y: Tensor = function(x, dense, bias, *options)
        elif kernel == "dense" and weight.matrix is not None and not is_in_torch_dispatch_mode():
            y = function(x, weight.matrix.to(x.dtype), bias, *options)
        else:
            y = product.convolution(x, factors, weight.lists, layout, bias, shape[2:], *options, kernel, scales)
    return y if batched else y.squeeze(0)
