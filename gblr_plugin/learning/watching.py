"""Moments at the inputs and outputs of layers, taken while any loop trains them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calibration.inputs import first_argument, input_rows, output_rows
from ..calibration.moments import Moments
from ..layers import GBLRLayer

__all__ = ["LayerWatch"]

_ROWS = 512  # samples taken of one forward pass


class LayerWatch:
    """Adds up second moments of a layer's inputs, and of the loss gradients at its output, over training steps.

    Of each forward pass some of the samples are taken. Samples at which the loss has no gradient, such as padding, are
    left out. Forward passes without gradients are passed over.

    Args:
        layer: Runs in a training.

    Attributes:
        moments: Of the inputs.
        slope: (m, m) float64 sum over samples of the outer products of the loss gradients at the output, up to a factor
            that is common to all layers of a model.
    """

    def __init__(self, layer: GBLRLayer) -> None:
        self._layer = layer
        self.reset()
        self._handle = layer.register_forward_hook(self._see, with_kwargs=True)

    def reset(self) -> None:
        """Forget all samples."""
        (m, n), device = self._layer.matrix_shape, self._layer.U.device
        self.moments = Moments(n, device)
        self.slope = torch.zeros(m, m, dtype=torch.float64, device=device)

    def remove(self) -> None:
        """Stop watching; the sums stay."""
        self._handle.remove()

    def _see(self, layer: GBLRLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if not (layer.training and output.requires_grad and torch.is_grad_enabled()):
            return
        x = first_argument(tuple(args), kwargs).detach()
        kernel: tuple[int, ...] | None = getattr(layer, "kernel_size", None)  # of convolutions
        batched = x.dim() > (1 if kernel is None else len(kernel) + 1)
        step = min(max(1, output.numel() // layer.matrix_shape[0] // _ROWS), len(x)) if batched else 1
        picked = slice(None, None, step)
        output.register_hook(partial(self._add, x[picked], picked))

    @torch.no_grad()
    def _add(self, x: Tensor, picked: slice, gradient: Tensor) -> None:
        rows = input_rows(self._layer, x).reshape(-1, self.moments.size)
        g = output_rows(self._layer, gradient[picked])
        if not bool(torch.isfinite(g).all() and torch.isfinite(rows).all()):
            return  # gradients overflowed under mixed precision: this step is not taken
        self.moments.add(rows, mask=(g != 0).any(1))
        self.slope += g.T @ g

    def all_reduce(self) -> None:
        """Add up the samples of all processes of ``torch.distributed``."""
        self.moments.all_reduce()
        torch.distributed.all_reduce(self.slope)

    def state_dict(self) -> dict[str, Any]:
        """The sums, as they are."""
        return {"moments": self.moments.state_dict(), "slope": self.slope.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.moments.load_state_dict(state["moments"])
        self.slope.copy_(state["slope"])
