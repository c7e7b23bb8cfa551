"""NaN and infinity in training: seen before an optimizer spreads them, explained in a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers import GBLRLayer
from ..layers.distributed_parameters import all_finite, own_part
from ..utils.files import write_text

__all__ = ["drop_gradients", "find_cause", "gradients_finite", "save_diagnostic"]

_PARTS = ("widths", "locations", "U", "V", "bias")


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def gradients_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients of an optimizer's parameters are finite; one answer for all processes that share them.

    Gradients that a GradScaler judges inside a fused step are left to it.
    """
    found_inf: Any = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf):
        return True
    return all_finite([parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None])


def drop_gradients(optimizer: Optimizer) -> None:
    """Take all gradients away: the step that follows changes neither parameters nor state."""
    for parameter in _parameters(optimizer):
        parameter.grad = None


def find_cause(layers: Mapping[str, GBLRLayer], gradients: bool = True) -> tuple[str, str] | None:
    """Name of the first layer with an entry that is not finite, and of what: parameters first, then gradients."""
    for of_gradient in (False, True)[: 1 + gradients]:
        for name, layer in layers.items():
            for part in _PARTS:
                tensor: Tensor | None = getattr(layer, part, None)
                tensor = tensor.grad if of_gradient and tensor is not None else tensor
                if tensor is not None and not all_finite([tensor]):
                    return name, f"the gradient of {part}" if of_gradient else part
    return None


@torch.no_grad()
def _counts(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    values = own_part(tensor).detach()
    finite = torch.isfinite(values)
    largest = float(values[finite].abs().max()) if bool(finite.any()) else None
    return {"entries": values.numel(), "not_finite": int((~finite).sum()), "largest_finite": largest}


def save_diagnostic(
    layers: Mapping[str, GBLRLayer], facts: Mapping[str, Any], folder: str | os.PathLike[str] | None
) -> Path | None:
    """Write what is known of every layer's values and gradients as JSON.

    Args:
        layers: By name.
        facts: Of the training: step, loss, sigma, and so on; put first.
        folder: Where; ``None``, or one that cannot be written to: the system's folder of temporary files.

    Returns:
        The new file, or ``None`` where none could be written.
    """
    report: dict[str, Any] = {**facts, "layers": {}}
    for name, layer in layers.items():
        parts = {part: getattr(layer, part, None) for part in _PARTS}
        report["layers"][name] = {
            part: {"values": _counts(tensor), "gradient": _counts(tensor.grad)}
            for part, tensor in parts.items()
            if tensor is not None
        }
    text = json.dumps(report, indent=2) + "\n"
    for place in (folder, tempfile.gettempdir()):
        if place is None:
            continue
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=f"gblr-step{facts.get('step', 0)}-", suffix=".json", dir=place)
            os.close(handle)
            write_text(path, text)
        except OSError:
            continue
        return Path(path)
    return None
