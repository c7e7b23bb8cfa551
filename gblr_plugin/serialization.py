"""Save converted models and load them into a dense skeleton, without pickling code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .files import write_atomic
from .layers import GBLRLayer
from .tensor import GBLRTensor

__all__ = ["load", "save"]

_FORMAT = "gblr-plugin"
_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a converted model's state, structure included; loadable with ``weights_only=True``.

    Args:
        model: A model whose structured layers are converted (:func:`gblr_plugin.convert`).
        path: Written whole or not at all.

    Raises:
        ConfigError: If the model still has trainable structured layers.
        OSError: If the file cannot be written.
    """
    pending = next((name for name, module in model.named_modules() if isinstance(module, GBLRLayer)), None)
    if pending is not None:
        raise ConfigError(f"save: layer {pending!r} is not converted yet; call gblr_plugin.convert(model) first")
    content = {"format": _FORMAT, "version": _VERSION, "state": model.state_dict()}
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Load a saved model into a skeleton of the dense network.

    Args:
        path: File written by :func:`save`.
        model: The dense network (any weights, also on the meta device), or a function that makes it. Changed in place.

    Returns:
        The model with frozen structured weights, in evaluation mode.

    Raises:
        ConfigError: If the file is missing, is not of this format, or does not fit the network.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"load: no file at {os.fspath(path)!r}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"load: {os.fspath(path)!r} is not a readable model file: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"load: {os.fspath(path)!r} is not a gblr_plugin model file")
    if content.get("version") != _VERSION:
        raise ConfigError(
            f"load: {os.fspath(path)!r} has format version {content.get('version')}, allowed is {_VERSION}"
        )
    skeleton = model if isinstance(model, nn.Module) else model()
    state: dict[str, Tensor] = content["state"]
    _fit_linears(skeleton, state)
    try:
        skeleton.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"load: {os.fspath(path)!r} does not fit the network: {reason}") from error
    for name, parameter in skeleton.named_parameters():
        if isinstance(state.get(name), GBLRTensor):
            parameter.requires_grad_(False)
    return skeleton.eval()


def _fit_linears(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Modules that became ``nn.Linear`` on conversion (Hugging Face ``Conv1D``) become so here."""
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            weight = state.get(f"{name}.weight")
            if isinstance(weight, GBLRTensor) and not isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                has_bias = f"{name}.bias" in state
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
                setattr(parent, child_name, linear)
