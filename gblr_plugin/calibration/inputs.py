"""Inputs and outputs of a model's layers in a forward pass, as rows that the layers' weight matrices multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..utils.running import evaluating

__all__ = [
    "first_argument",
    "fitting_mask",
    "input_rows",
    "layer_inputs",
    "output_rows",
    "shared_inputs",
]

PATCHES = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
"""What of a convolution decides which patches of its input it sees."""


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows that its weight matrix multiplies.

    Args:
        module: Linear-like, nn.Conv1d or nn.Conv2d.
        x: Its input.

    Returns:
        (..., n): x itself, or the patches that a convolution sees, (batch, positions, c_in * kernel size).
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation = x[..., None, :], (1, *kernel), (1, *dilation)
        padding, stride = (0, *padding), (1, *stride)
    if x.dim() == 3:
        x = x[None]
    return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """(N, m) float64 rows of a layer's output, or of its gradient."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        dims = len(module.kernel_size)
        y = y.reshape(-1, *y.shape[-1 - dims :]).flatten(2).transpose(1, 2)
    return y.detach().reshape(-1, y.shape[-1]).double()


def fitting_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask in the shape of a layer's samples; ``None`` if their shapes differ (pooled inputs have no padding)."""
    if mask is None or mask.numel() != rows.shape[:-1].numel():
        return None
    return mask.reshape(rows.shape[:-1])


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer among the arguments that it was called with."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


class _AllSeenError(Exception):
    """Ends a forward pass once every wanted input was seen."""


def layer_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object], *, stop: bool = False
) -> dict[str, list[Tensor]]:
    """Inputs of each call of each layer during one forward pass.

    Args:
        model: Runs in the mode that it is in.
        layers: Its modules by name.
        run: Runs the model.
        stop: End the pass once every layer was called; right only where each is called once.

    Returns:
        By name, in order of first execution; layers that were not called are absent.
    """
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, []).append(first_argument(args, kwargs).detach())
            if stop and len(seen) == len(layers):
                raise _AllSeenError

        return record

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        run()
    except _AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def shared_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object]
) -> tuple[list[list[str]], set[str]]:
    """Which layers see the same input, found in one forward pass in evaluation mode.

    Args:
        model: In any training mode; unchanged on return.
        layers: Its modules by name.
        run: Runs the model.

    Returns:
        Groups of names whose inputs are the same rows, in order of first execution, and the names of the layers that
        are called once in a pass.

    Raises:
        ConfigError: If a layer is never run.
    """
    with evaluating(model):
        seen = layer_inputs(model, layers, run)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise ConfigError(f"calibration: layer {missing[0]!r} is never run by the model's forward pass")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        patches = tuple(getattr(layers[name], setting, None) for setting in PATCHES)
        groups.setdefault((patches, *((x.data_ptr(), x.shape, x.stride()) for x in inputs)), []).append(name)
    return list(groups.values()), {name for name, inputs in seen.items() if len(inputs) == 1}
