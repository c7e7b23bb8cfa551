"""Gaudi masks and masked factors as differentiable functions of widths and locations.

Under the straight-through estimator (STE) widths and locations are integers in the forward pass, and masks and their
gradients are differences of shifted copies of the two tables that :func:`~gblr_plugin.matrix.gaudi_mask.mask_tables`
makes. That takes one FFT per (N, sigma) instead of K per step. If numba (on the CPU) or Triton (on CUDA) is installed,
compiled kernels compute masks and gradients in one pass over memory; otherwise torch operations do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..kernels.optional import mask_kernels
from ..matrix.gaudi_mask import fft_mask, integer_locations, integer_widths, mask_tables

__all__ = ["gaudi_mask", "masked_factor", "table_mask", "transformed"]

_CACHED_ELEMENTS = 1 << 17  # 512 KiB in float32: stays in the second-level cache, and outweighs the cost of a call


def _windows(table: Tensor, first: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """Rows ``table[first : first + N]``, (K, N); copies whole rows, needs no index matrix."""
    view = table.as_strided((2 * n + 1, n), (1, 1))
    return view.index_select(0, first) if out is None else torch.index_select(view, 0, first, out=out)


def _chunks(num: int, n: int, like: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Ranges of components whose masks stay in the cache together, each with the same scratch memory.

    On a GPU, and in compiled code, there is one range, and results are allocated as usual (``None``).
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(0, num), [None] * buffers
        return
    size = max(1, _CACHED_ELEMENTS // n)
    scratch = [torch.empty(min(size, num), n, dtype=like.dtype) for _ in range(buffers)]  # fresh pages cost most
    for first in range(0, num, size):
        stop = min(first + size, num)
        yield slice(first, stop), [memory[: stop - first] for memory in scratch]


def _edge_gradients(
    upstream: Tensor, factor: Tensor | None, tables: Tensor, w: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (K,) of width and location, without a full (K, N) gradient ``upstream * factor`` of the mask."""
    n = tables.shape[1] // 3
    first, last = _edges(tables, w, start)
    kernels = mask_kernels(tables, len(w) * n, (upstream,)) if factor is None else None
    if kernels is not None:
        trailing, leading = kernels.edge_sums(tables, first, last, upstream)
        return trailing, trailing - leading
    trailing = torch.empty(len(w), dtype=tables.dtype, device=tables.device)
    leading = torch.empty_like(trailing)
    for chunk, (window, product) in _chunks(len(w), n, tables, 2):
        grad = upstream[chunk].to(tables.dtype)
        if factor is not None:
            grad = torch.mul(grad, factor[chunk].to(tables.dtype), out=product)
        # The product of a row with its window, summed at once.
        trailing[chunk] = _windows(tables[1], last[chunk], n, window).mul_(grad).sum(1)
        leading[chunk] = _windows(tables[1], first[chunk], n, window).mul_(grad).sum(1)
    return trailing, trailing - leading


class _TableMask(torch.autograd.Function):
    @staticmethod
    def forward(width: Tensor, location: Tensor, tables: Tensor, w: Tensor, start: Tensor) -> Tensor:
        return _masks(None, tables, w, start)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        width, location, tables, w, start = inputs
        ctx.save_for_backward(tables, w, start)
        ctx.dtypes = width.dtype, location.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        width, location = _edge_gradients(grad, None, *ctx.saved_tensors)
        return width.to(ctx.dtypes[0]), location.to(ctx.dtypes[1]), None, None, None


class _MaskedFactor(torch.autograd.Function):
    """Mask times factor and its gradients; no (K, N) mask or mask gradient is held."""

    @staticmethod
    def forward(factor: Tensor, width: Tensor, location: Tensor, tables: Tensor, w: Tensor, start: Tensor) -> Tensor:
        return _masks(factor, tables, w, start)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        factor, width, location, tables, w, start = inputs
        ctx.save_for_backward(factor, tables, w, start)
        ctx.dtypes = width.dtype, location.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        factor, tables, w, start = ctx.saved_tensors
        with_edges = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kernels = mask_kernels(tables, factor.numel(), (factor, grad)) if all(ctx.needs_input_grad[:2]) else None
        to_factor: Tensor | None = None
        to_width: Any = None
        to_location: Any = None
        if kernels is not None:
            to_factor, (trailing, leading) = kernels.masked_gradients(tables, *_edges(tables, w, start), grad, factor)
            to_width, to_location = trailing, trailing - leading
        else:
            if ctx.needs_input_grad[0]:
                to_factor = _masks(grad, tables, w, start).to(factor.dtype)
            if with_edges:
                to_width, to_location = _edge_gradients(grad, factor, tables, w, start)
        if with_edges:
            to_width, to_location = to_width.to(ctx.dtypes[0]), to_location.to(ctx.dtypes[1])
        return to_factor, to_width, to_location, None, None, None


def _edges(tables: Tensor, w: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """First entries of a component's windows in the tables: at its leading and at its trailing edge."""
    leading = tables.shape[1] // 3 * 2 - start
    return leading, leading - w


def _masks(factor: Tensor | None, tables: Tensor, w: Tensor, start: Tensor) -> Tensor:
    """(K, N) masks in the dtype of the tables, or ``mask * factor`` in that of the factor."""
    n = tables.shape[1] // 3
    first, last = _edges(tables, w, start)
    kernels = mask_kernels(tables, len(w) * n, (factor,))
    if kernels is not None:
        return cast(Tensor, kernels.window_differences(tables, first, last, factor))
    prefix = tables[0]
    if factor is None:
        result = _windows(prefix, first, n)
        for chunk, (window,) in _chunks(len(w), n, tables, 1):
            result[chunk] -= _windows(prefix, last[chunk], n, window)
        return result
    result = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
    for chunk, (leading, trailing) in _chunks(len(w), n, tables, 2):
        mask = _windows(prefix, first[chunk], n, leading).sub_(_windows(prefix, last[chunk], n, trailing))
        torch.mul(mask, factor[chunk], out=result[chunk])
    return result


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: it needs torch operations with all their rules."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _plain_mask(width: Tensor, location: Tensor, tables: Tensor, w: Tensor, start: Tensor) -> Tensor:
    """The mask as the linear function of width and location that has its value and its first derivatives here."""
    n = tables.shape[1] // 3
    first, last = _edges(tables, w, start)
    index = torch.arange(n, device=tables.device)
    leading, trailing = first[:, None] + index, last[:, None] + index
    prefix, slope = tables[0], tables[1]
    by_location = slope[trailing] - slope[leading]
    change = (width - width.detach()).to(tables.dtype), (location - location.detach()).to(tables.dtype)
    return prefix[leading] - prefix[trailing] + slope[trailing] * change[0][:, None] + by_location * change[1][:, None]


def table_mask(width: Tensor, location: Tensor, tables: Tensor, align: int = 1) -> Tensor:
    """STE mask from precomputed :func:`mask_tables`.

    Args:
        width: (K,) normalised widths in [0, 1].
        location: (K,) normalised locations.
        tables: (2, 3N) from :func:`mask_tables`; sets the dtype and device of the result.
        align: Snap widths and locations to multiples of this many samples.

    Returns:
        (K, N) mask of the rounded intervals; gradients pass through the rounding unchanged.
    """
    n = tables.shape[1] // 3
    w, start = integer_widths(width, n, align), integer_locations(location, n, align)
    if transformed():
        return _plain_mask(width, location, tables, w, start)
    return cast(Tensor, _TableMask.apply(width, location, tables, w, start))  # type: ignore[no-untyped-call]  # untyped in torch


def masked_factor(factor: Tensor, width: Tensor, location: Tensor, tables: Tensor, align: int = 1) -> Tensor:
    """``table_mask(width, location, tables, align) * factor``, with less memory traffic.

    Args:
        factor: (K, N) floating point.
        width: (K,) normalised widths in [0, 1].
        location: (K,) normalised locations.
        tables: (2, 3N) from :func:`mask_tables`.
        align: Snap widths and locations to multiples of this many samples.

    Returns:
        (K, N) in the dtype of ``factor``, differentiable once in factor, width and location. Neither the mask nor its
        gradient is kept; both are made again from the tables, in pieces that stay in the cache.
    """
    if torch.compiler.is_compiling() or transformed():  # the compiler fuses the plain form
        return table_mask(width, location, tables, align).to(factor.dtype) * factor
    n = tables.shape[1] // 3
    w, start = integer_widths(width, n, align), integer_locations(location, n, align)
    return cast(Tensor, _MaskedFactor.apply(factor, width, location, tables, w, start))  # type: ignore[no-untyped-call]  # untyped in torch


def gaudi_mask(
    width: Tensor,
    location: Tensor,
    n: int,
    sigma: float | None,
    *,
    straight_through: bool = True,
    form: str = "table",
    align: int = 1,
) -> Tensor:
    """Gaudi masks of K components on an axis of length N (paper Sec. 3.2; tables: docs/how-it-works.md).

    Args:
        width: (K,) floating point, fraction of the axis in [0, 1].
        location: (K,) floating point, fraction of the axis; taken modulo 1.
        n: Axis length N.
        sigma: Smoothness, > 0; ``None`` for the exact boxcar.
        straight_through: Round to whole samples forward and pass gradients unchanged (paper Sec. 3.2). ``False``
            evaluates the mask at the real-valued parameters, which needs the FFT form.
        form: ``"table"``, or ``"fft"`` for the published formula, kept as the reference.
        align: With ``straight_through``, round to multiples of this many samples.

    Returns:
        (K, N) mask in the dtype of ``width``; differentiable in ``width`` and ``location``. The derivative in the width
        does not vanish at width 0, so that a dead component can come back.

    Raises:
        ConfigError: If shapes differ from (K,), sigma <= 0, n < 1, align < 1, or ``form`` is unknown.

    Example:
        >>> gaudi_mask(torch.tensor([0.5]), torch.tensor([0.25]), 4, None)
        tensor([[0., 1., 1., 0.]])
    """
    if width.dim() != 1 or width.shape != location.shape:
        raise ConfigError(
            f"gaudi mask: width and location must be (K,), got {tuple(width.shape)} and {tuple(location.shape)}"
        )
    if form not in ("table", "fft"):
        raise ConfigError(f"gaudi mask: form must be 'table' or 'fft', got {form!r}")
    if align < 1:
        raise ConfigError(f"gaudi mask: align must be at least 1, got {align}")
    tables = mask_tables(n, sigma, width.dtype, width.device)
    if straight_through and form == "table":
        return table_mask(width, location, tables, align)
    if straight_through:
        width = width + (integer_widths(width, n, align).to(width.dtype) / n - width).detach()
        location = location + (integer_locations(location, n, align).to(location.dtype) / n - location).detach()
    return fft_mask(width, location, n, sigma)
