"""Save converted models and load them into a dense skeleton, without pickling code."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .files import write_atomic
from .layers import GBLRLayer
from .swap import replace_modules, structurable
from .tensor import GBLRTensor

__all__ = ["load", "save"]

_FORMAT = "gblr-plugin"
_VERSION = 1
_NOTES = ("structure_name", "gblr_note")  # plain attributes of layers that the report shows


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a converted model's state, structure included; loadable with ``weights_only=True``.

    Args:
        model: A model whose structured layers are converted (:func:`gblr_plugin.convert`).
        path: Written whole or not at all.

    Raises:
        ConfigError: If the model still has trainable structured layers.
        OSError: If the file cannot be written.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    pending = next((name for name, module in modules.items() if isinstance(module, GBLRLayer)), None)
    if pending is not None:
        raise ConfigError(f"save: layer {pending!r} is not converted yet; call gblr_plugin.convert(model) first")
    notes = {
        name: {key: value for key in _NOTES if isinstance(value := vars(module).get(key), str)}
        for name, module in modules.items()
    }
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "state": model.state_dict(),
        # A Hugging Face Conv1D is an nn.Linear when converted; shapes alone do not tell where the weight is square.
        "linear": [name for name, module in modules.items() if type(module) is nn.Linear],
        "notes": {name: note for name, note in notes.items() if note},
    }
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Load a saved model into a skeleton of the dense network.

    Args:
        path: File written by :func:`save`.
        model: The dense network (any weights, also on the meta device), or a function that makes it. Changed in place;
            tensors are taken from the file, on the CPU.

    Returns:
        The model with frozen structured weights, in evaluation mode.

    Raises:
        ConfigError: If the file is missing, damaged or not of this format, or does not fit the network.
    """
    content = _read(os.fspath(path))
    skeleton = model if isinstance(model, nn.Module) else model()
    state: dict[str, Tensor] = content["state"]
    _make_linear(skeleton, set(content["linear"]))
    tied = _tied_parameters(skeleton)
    try:
        skeleton.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"load: {os.fspath(path)!r} does not fit the network: {reason}") from error
    for owner, name, first, first_name in tied:
        if torch.equal(getattr(owner, name), getattr(first, first_name)):
            setattr(owner, name, getattr(first, first_name))
    for name, parameter in skeleton.named_parameters():
        if isinstance(state.get(name), GBLRTensor):
            parameter.requires_grad_(False)
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name, note in content["notes"].items():
        if name in modules:
            modules[name].__dict__.update(note)
    empty = next(
        (name for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()] if tensor.is_meta), None
    )
    if empty is not None:
        raise ConfigError(
            f"load: {empty!r} of the network is on the meta device and is not saved with a model (a non-persistent "
            "buffer); make the network on a real device"
        )
    return skeleton.eval()


def read_file(path: str, who: str) -> Any:
    """What ``torch.save`` wrote, on the CPU, without running code of the file.

    Args:
        path: The file.
        who: First word of error messages.

    Raises:
        ConfigError: If the file is missing, unreadable or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{who}: no file at {path!r}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{who}: cannot read {path!r}: {error.strerror}") from error
    except Exception as error:  # torch raises half a dozen kinds over damaged and foreign files
        raise ConfigError(f"{who}: {path!r} is damaged, or not a file of weights") from error


def _is_sound(tensor: Any) -> bool:
    """Whether the indices of a structured weight are those that its own intervals give; kernels trust them."""
    if not isinstance(tensor, GBLRTensor):
        return True
    layout, (m, n) = tensor.packing, tensor.packing.shape
    int8, scales = tensor.factors.dtype == torch.int8, tensor.scales
    if int8 != (scales is not None) or (scales is not None and scales.shape != (layout.num_components,)):
        return False
    if layout.dense:
        return not layout.transposed and tensor.factors.numel() == m * n
    try:
        again = GBLRTensor.from_structured(tensor.to_structured(), shape=tensor.outer_shape, plan=tensor.plan)
    except Exception:  # whatever comes of indices that do not fit
        return False
    return (
        again.packing == layout
        and tensor.factors.shape == again.factors.shape
        and torch.equal(tensor.lists, again.lists)
        and tensor.lists.dtype == again.lists.dtype
    )


def _read(path: str) -> dict[str, Any]:
    content = read_file(path, "load")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"load: {path!r} is not a gblr_plugin model file")
    if content.get("version") != _VERSION:
        raise ConfigError(f"load: {path!r} has format version {content.get('version')}, allowed is {_VERSION}")
    state, linear, notes = (content.get(key) for key in ("state", "linear", "notes"))
    if (
        not (isinstance(state, dict) and isinstance(linear, list) and isinstance(notes, dict))
        or not all(isinstance(name, str) for name in (*state, *linear, *notes))
        or not all(
            isinstance(note, dict) and all(key in _NOTES and isinstance(note[key], str) for key in note)
            for note in notes.values()
        )
    ):
        raise ConfigError(f"load: {path!r} is damaged, or not a gblr_plugin model file")
    unsound = next((name for name, tensor in state.items() if not _is_sound(tensor)), None)
    if unsound is not None:
        raise ConfigError(f"load: {path!r} is damaged: the indices of {unsound!r} do not fit together")
    return content


def _make_linear(model: nn.Module, linear: set[str]) -> None:
    """Modules that became ``nn.Linear`` on conversion (Hugging Face ``Conv1D``) become so here."""
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in linear and structurable(module) and not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            weight: Any = module.weight  # stored (in, out)
            inputs, outputs = weight.shape
            replacements[id(module)] = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta")
    replace_modules(model, replacements)


def _tied_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Places that hold a parameter which another place holds too, each with that first place."""
    first: dict[int, tuple[nn.Module, str]] = {}
    tied = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = first.setdefault(id(parameter), (module, name))
            if place != (module, name):
                tied.append((module, name, *place))
    return tied
