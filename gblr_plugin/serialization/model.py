"""Save converted models and load them, without pickled code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..families.layers import FamilyLayer, layer_like
from ..layers import GBLRLayer
from ..layers.dense import replace_modules, structurable, weight_matrix
from ..layers.full import FULL, as_full
from ..layers.separation import separate
from ..tensor.frozen import use_kept_matrix
from ..tensor.gblr_tensor import GBLRTensor
from .container import Container, entries_of, shard_paths, write_container
from .families import family_record, matrix_in_state
from .header import Header, read_headers
from .weights import flatten_weight, part_names, plan_record, unflatten_weight

__all__ = ["flatten_model", "load_into", "read_state", "save"]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a converted model's state, structure included, as a safetensors file.

    Structured weights are stored as their intervals and the factors inside them, in about as many bytes as they have
    factors; layers of other families as their factors and geometry; tied tensors once.

    Args:
        model: A model whose structured layers are converted (:func:`gblr_plugin.convert`).
        path: Written whole or not at all.

    Raises:
        ConfigError: If the model still has trainable structured layers, or a state that such files cannot hold.
        OSError: If the file cannot be written.
    """
    tensors, header = flatten_model(model)
    write_container(path, entries_of(tensors), header.to_metadata(), tensors.__getitem__)


def load_into(path: str | os.PathLike[str], network: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Load a saved model into a dense network; see :func:`gblr_plugin.load`, which also makes the network.

    Args:
        path: File written by :func:`save`, or a folder with a file or shards of that kind.
        network: The dense network, or a function that makes it. Changed in place.

    Returns:
        The model with frozen structured weights, in evaluation mode.

    Raises:
        ConfigError: If the file is missing, damaged or not of this format, or does not fit the network.
    """
    place = os.fspath(path)
    if os.path.isfile(place) and _is_torch_file(place):
        raise ConfigError(f"load: {place!r} is a file of torch.save; give one that gblr_plugin.save() wrote")
    containers = [Container(file) for file in (shard_paths(place) if os.path.isdir(place) else [place])]
    header = read_headers(containers)
    skeleton = _skeleton(network, header, [name for container in containers for name in container.entries])
    stored = {name: tensor for container in containers for name, tensor in container.read_all()}
    for container in containers:
        container.close()
    return _fill(skeleton, _assemble(stored, header, skeleton, place), header, place)


def read_state(path: str | os.PathLike[str], who: str) -> dict[str, Tensor]:
    """The plain tensors of a dense network: a file of :func:`save`, of ``torch.save(state_dict)``, or safetensors.

    Args:
        path: The file.
        who: First word of error messages.

    Raises:
        ConfigError: If it is missing, damaged, or holds anything but plain tensors.
    """
    place = os.fspath(path)
    state: Any
    if os.path.isfile(place) and _is_torch_file(place):
        content = _read_torch(place, who)
        state = content.get("state", content) if isinstance(content, dict) else None
    else:
        container = Container(place, who)
        header = read_headers([container], who) if "gblr" in container.metadata else Header()
        state = None if header.weights or header.families or header.torchao else dict(container.read_all())
        if state is not None:
            state.update({alias: state[name] for alias, name in header.tied.items() if name in state})
    if not isinstance(state, dict) or not all(type(value) is Tensor for value in state.values()):
        raise ConfigError(f"{who}: {place!r} holds no state dict of a dense network")
    return state


def _read_torch(path: str, who: str) -> Any:
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


def _is_torch_file(path: str) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    # The first bytes of a safetensors file are a length and can be any; its header then begins with a brace.
    return start[8:] != b"{" and start.startswith((b"PK", b"\x80\x02"))


# -- saving ----------------------------------------------------------------------------------------------------------


def flatten_model(model: nn.Module) -> tuple[dict[str, Tensor], Header]:
    """A converted model's state as plain tensors, and what has to be said about them.

    Raises:
        ConfigError: As :func:`save`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    pending = next((name for name, module in modules.items() if isinstance(module, GBLRLayer)), None)
    if pending is not None:
        raise ConfigError(f"save: layer {pending!r} is not converted yet; call gblr_plugin.convert(model) first")
    header = Header()
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"save: {name!r} is a {type(value).__name__}; files hold tensors alone")
        if value.is_meta:
            raise ConfigError(f"save: {name!r} is on the meta device, it has no values")
        same = first.setdefault(_identity(value), name)
        if same != name:
            header.tied[name] = same
        elif isinstance(value, GBLRTensor):
            entries, record = flatten_weight(name, value)
            header.weights[name] = {**record, "plan": header.number_of(plan_record(value.plan))}
            _add(tensors, entries)
        elif type(value) is Tensor:
            _add(tensors, {name: value})
        else:
            _add(tensors, _flatten_torchao(name, value, header))
    for name, module in modules.items():
        if isinstance(module, FULL):
            header.full.append(name)
        if isinstance(module, FamilyLayer) and all(modules[other] is not module for other in header.families):
            header.families[name] = family_record(module.geometry)
    return tensors, header


def _add(tensors: dict[str, Tensor], entries: Mapping[str, Tensor]) -> None:
    taken = next((name for name in entries if name in tensors), None)
    if taken is not None:
        raise ConfigError(f"save: two tensors of the model would be called {taken!r}")
    tensors.update(entries)


def _identity(value: Tensor) -> Any:
    """Equal for names of one and the same tensor."""
    inner = value.factors if isinstance(value, GBLRTensor) else value
    if type(inner) is not Tensor or not inner.numel():
        return id(value)
    return type(value), inner.data_ptr(), value.shape, inner.stride(), inner.dtype


def _flatten_torchao(name: str, value: Tensor, header: Header) -> dict[str, Tensor]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    inside = f"gblr.{name}"  # torchao splits names at the last dot
    try:
        tensors, said = flatten_tensor_state_dict({inside: value})
    except ValueError as error:
        raise ConfigError(f"save: {name!r} is a {type(value).__name__}, which safetensors files cannot hold") from error
    header.torchao[name] = said[inside]
    return {key.removeprefix("gblr."): tensor for key, tensor in tensors.items()}


# -- loading ---------------------------------------------------------------------------------------------------------


def _skeleton(network: nn.Module | Callable[[], nn.Module], header: Header, stored: list[str]) -> nn.Module:
    skeleton = network if isinstance(network, nn.Module) else network()
    separate(skeleton, [*stored, *header.weights, *(f"{name}.weight" for name in header.families)])
    structured = {name.removesuffix(".weight") for name in header.weights if name.endswith(".weight")}
    _make_linear(skeleton, set(header.full) | structured)
    return skeleton


def _assemble(stored: dict[str, Tensor], header: Header, skeleton: nn.Module, path: str) -> dict[str, Tensor]:
    """The state dict: structured and quantized weights put together from their parts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    state: dict[str, Tensor] = {}
    try:
        for name in header.weights:
            if name not in shapes:
                raise ConfigError(f"the network has no weight {name!r}")
            tensors = {key: stored.pop(key) for key in part_names(name) if key in stored}
            state[name] = unflatten_weight(header.record(name), tensors, name, shapes[name]).replanned_here()
        for name, said in header.torchao.items():
            state[name] = _unflatten_torchao(name, said, stored)
        state.update(stored)
        for alias, name in header.tied.items():
            if alias in state or name not in state:
                raise ConfigError(f"{alias!r} is tied to {name!r}, which is not there")
            state[alias] = state[name]
    except ConfigError as error:
        raise ConfigError(f"load: {path!r} does not fit the network, or is damaged: {error}") from error
    return state


def _unflatten_torchao(name: str, said: str, stored: dict[str, Tensor]) -> Tensor:
    import json

    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    inside = f"gblr.{name}"
    module, _, last = inside.rpartition(".")
    prefix = f"{module.removeprefix('gblr')}._{last}_".removeprefix(".")
    tensors = {f"gblr.{key}": stored.pop(key) for key in list(stored) if key.startswith(prefix)}
    try:
        state, _ = unflatten_tensor_state_dict(tensors, {inside: said, "tensor_names": json.dumps([inside])})
        value: Tensor = state[inside]
    except Exception as error:  # torchao checks nothing itself
        raise ConfigError(f"the quantized weight {name!r} cannot be put together") from error
    return value


def _fill(skeleton: nn.Module, state: dict[str, Tensor], header: Header, path: str) -> nn.Module:
    skeleton = _restore_families(skeleton, state, header, path)
    tied = _tied_parameters(skeleton)
    try:
        skeleton.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"load: {path!r} does not fit the network: {reason}") from error
    for owner, name, first, first_name in tied:
        if torch.equal(getattr(owner, name), getattr(first, first_name)):
            setattr(owner, name, getattr(first, first_name))
    for name, parameter in skeleton.named_parameters():
        if name in header.torchao or isinstance(state.get(name), GBLRTensor):
            parameter.requires_grad_(False)
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name in header.families:
        family: Any = modules[name]
        family.freeze_factors()
    for name in header.full:
        if name in modules:
            as_full(modules[name])
    for module in modules.values():
        use_kept_matrix(module)
    empty = next(
        (name for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()] if tensor.is_meta), None
    )
    if empty is not None:
        raise ConfigError(
            f"load: {empty!r} of the network is on the meta device and is not saved with a model (a non-persistent "
            "buffer); make the network on a real device"
        )
    return skeleton.eval()


def _restore_families(skeleton: nn.Module, state: Mapping[str, Tensor], header: Header, path: str) -> nn.Module:
    """Dense layers of the skeleton that are layers of a family in the file become so."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    layers: dict[int, nn.Module] = {}
    for name, record in header.families.items():
        module = modules.get(name)
        if isinstance(module, FamilyLayer) and family_record(module.geometry) == record:
            continue
        if module is None or not structurable(module):
            raise ConfigError(f"load: {path!r} does not fit the network: {name!r} is no layer that can be structured")
        m, n = weight_matrix(module).shape
        try:
            layers[id(module)] = layer_like(module, matrix_in_state(state, name, record, (m, n)))
        except ConfigError as error:
            raise ConfigError(f"load: {path!r} does not fit the network, or is damaged: {name!r}: {error}") from error
    return replace_modules(skeleton, layers)


def _make_linear(model: nn.Module, linear: set[str]) -> None:
    """Modules that became ``nn.Linear`` on conversion (Hugging Face ``Conv1D``) become so here.

    Shapes do not tell which ones: a square weight looks the same in both.
    """
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
