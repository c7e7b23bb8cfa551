"""The product by a named kernel, or by torch operations where that kernel may not run.

``dense`` multiplies by the dense matrix; ``blocks`` is torch operations and always possible; ``compiled`` is numba on a
CPU and Triton on CUDA, as one operator with gradients. Exported programs take torch operations whatever the plan says,
since they must run without this package; so do FLOP counters, functorch and forward-mode gradients, which look into the
product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blocks, compiled
from ._compat import forward_gradients, functorch_transform, tracing
from .buffers import to_dense
from .layout import Layout
from .soundness import PLAIN

__all__ = ["KERNELS", "convolution", "is_plain", "linear"]

KERNELS = ("dense", "blocks", "compiled")


def is_plain(*tensors: Tensor) -> bool:
    """Whether code that torch cannot see may run: no trace, dispatch mode, FLOP counter or functorch transform."""
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return False
    return (
        not tracing() and not is_in_torch_dispatch_mode() and functorch_transform() is None and not forward_gradients()
    )


def _runs_compiled(
    x: Tensor, factors: Tensor, lists: Tensor, scales: Tensor | None, layout: Layout, kernel: str
) -> bool:
    if (
        kernel != "compiled"
        or (scales is not None and not (x.device.type == "cpu" and x.dtype == scales.dtype == torch.float32))
        or not compiled.available(x.device, x.dtype)
        or not compiled.fits(layout, x.device, x.dtype)
    ):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return is_plain(x, factors, lists)


def linear(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    layout: Layout,
    bias: Tensor | None,
    kernel: str,
    scales: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n), by the named kernel where it may run and by torch operations elsewhere.

    Args:
        x: (tokens, n), dtype and device of ``factors`` (of ``scales`` where there are some).
        factors: Flat factors, see :class:`~gblr_plugin.kernels.layout.Layout`.
        lists: int32 lists, intervals and block tables.
        layout: Layout of the buffers.
        bias: (m,) or None.
        kernel: One of :data:`KERNELS`.
        scales: (components,) of int8 factors; compiled kernels take them in float32 on the CPU.

    Returns:
        (tokens, m).
    """
    if layout.dense:
        return F.linear(x, to_dense(layout, factors, lists, scales), bias)
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    traced = torch.compiler.is_compiling()
    if _runs_compiled(x, factors, lists, scales, layout, kernel):
        return compiled.linear(x, factors, lists, layout, bias, opaque=not (gradients or traced), scales=scales)
    if gradients or traced or not is_plain(x):
        return blocks.linear(x, factors, lists, layout, bias, scales)
    return blocks.linear_inference(x, factors, lists, layout, bias, scales)


def convolution(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    layout: Layout,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    kernel: str,
    scales: Tensor | None = None,
) -> Tensor:
    """Convolution of x (batch, c_in, ...) with the (c_out, c_in * prod(sizes)) matrix; returns (batch, c_out, ...).

    The compiled kernel takes the unfolded input of one example after another, output places being its tokens; torch
    operations convolve block by block (:func:`~gblr_plugin.kernels.blocks.convolution`).

    Args:
        x: One or two axes of places, dtype and device of ``factors``.
        factors: Flat factors.
        lists: int32 lists, intervals and block tables.
        layout: Layout of the buffers.
        bias: (c_out,) or None.
        sizes: Kernel size per axis.
        stride: As in ``F.conv2d``, per axis.
        padding: As in ``F.conv2d``, per axis or ``"same"`` / ``"valid"``.
        dilation: As in ``F.conv2d``, per axis.
        kernel: One of :data:`KERNELS`.
        scales: As in :func:`linear`.
    """
    if not x.shape[0] or not _runs_compiled(x, factors, lists, scales, layout, kernel):
        return blocks.convolution(x, factors, lists, layout, bias, sizes, stride, padding, dilation, scales)
    if isinstance(padding, str):
        total = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, sizes, strict=True)]
        x = F.pad(x, [side for extent in reversed(total) for side in (extent // 2, extent - extent // 2)])
        padding = (0,) * len(sizes)
    places = tuple(
        (extent + 2 * p - d * (size - 1) - 1) // s + 1
        for extent, p, d, size, s in zip(x.shape[2:], padding, dilation, sizes, stride, strict=True)
    )
    if len(sizes) == 1:  # as a picture of height 1
        x, sizes, stride = x.unsqueeze(2), (1, *sizes), (1, *stride)
        padding, dilation = (0, *padding), (1, *dilation)
    pointwise = set(sizes) == {1} == set(stride) and set(padding) == {0}
    images = []
    for image in x.split(1):
        columns = image.flatten(2) if pointwise else F.unfold(image, sizes, dilation, padding, stride)
        images.append(linear(columns[0].t(), factors, lists, layout, bias, kernel, scales).t())
    y: Tensor = torch.stack(images).unflatten(2, places)
    return y
