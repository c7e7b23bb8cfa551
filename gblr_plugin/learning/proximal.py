"""Prox-and-clip: the proximal step that shrinks widths and keeps structure parameters in their domain (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.optional import proximal_kernel

__all__ = ["prox_and_clip_"]


@torch.no_grad()
def prox_and_clip_(widths: Sequence[Tensor], locations: Sequence[Tensor], thresholds: Tensor) -> None:
    """In place, over all layers at once: ``w <- clip(softshrink(w, t), 0, 1)``, ``l <- l - floor(l)``.

    Because of the clip at zero, softshrink is a subtraction. A negative threshold lets the live widths of a layer grow
    (a budget that is not used up); widths at zero then stay where they are. The number of kernel launches does not
    depend on the number of layers: on CUDA one kernel takes them all where triton is there, else widths are handled as
    one flat tensor, locations by ``torch._foreach_*``.

    Args:
        widths: Per layer (2, K), floating point, one dtype and device.
        locations: Per layer (2, K).
        thresholds: (L,) threshold of each layer; ``lambda * lr`` for a fixed lambda (paper Algorithm 1).
    """
    if not widths:
        return
    kernel = proximal_kernel([*widths, *locations])
    if kernel is not None:
        kernel(widths, locations, thresholds)
        return
    sizes = [each.numel() for each in widths]
    flat = torch.cat([each.reshape(-1) for each in widths])
    counts = torch.tensor(sizes, device=flat.device)
    step = thresholds.to(flat.dtype).repeat_interleave(counts, output_size=sum(sizes))
    flat = torch.where((step < 0) & (flat <= 0), flat, flat - step).clamp_(0, 1)
    shrunk = [each.view_as(like) for each, like in zip(flat.split(sizes), widths, strict=True)]
    torch._foreach_copy_(list(widths), shrunk)
    torch._foreach_sub_(list(locations), torch._foreach_floor(list(locations)))
