"""Hugging Face folders of converted models: ``config.json`` names the class, safetensors hold weights and structure.

Importing this module teaches transformers the quantization method ``"gblr"``, so that its own ``from_pretrained`` and
``save_pretrained`` read and write such folders. ``import gblr_plugin`` sees to it where transformers is imported too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from ..families.layers import FamilyLayer, layer_like
from ..layers import GBLRLayer
from ..layers.dense import KINDS, replace_modules, structurable, weight_matrix
from ..layers.full import FULL, as_full
from ..layers.separation import separate
from ..serialization.container import (
    INDEX,
    Container,
    Entry,
    entries_of,
    shard_paths,
    split_shards,
    write_container,
    write_index,
)
from ..serialization.families import restore_on_meta
from ..serialization.header import Header, read_headers
from ..serialization.model import flatten_model
from ..serialization.weights import part_names, unflatten_weight
from ..tensor.frozen import use_kept_matrix
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.files import write_text
from ..utils.optional_imports import quiet_import

with quiet_import("gblr_plugin.huggingface.folders", "transformers 5.14", "transformers>=5.14,<6"):
    import transformers
    from transformers.modeling_utils import PreTrainedModel
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer

    from ._compat import mark_initialised, quantized_by, wrap_save_pretrained
    from .config import METHOD, GBLRHfConfig, compress_loaded

__all__ = ["class_of", "empty_network", "from_pretrained", "quiet_bar", "save_pretrained"]


def save_pretrained(model: Any, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Save a converted transformers model as a folder that :func:`from_pretrained` reads.

    Args:
        model: A ``PreTrainedModel`` whose structured layers are converted (:func:`gblr_plugin.convert`).
        folder: Made if needed; each file is written whole or not at all, ``config.json`` last.
        max_shard_bytes: Files are split above this size, and listed in an index.

    Raises:
        ConfigError: If it is no model of transformers, or cannot be saved (see :func:`gblr_plugin.save`).
        OSError: If a file cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"save_pretrained: need a model of transformers, got a {type(model).__name__}")
    folder = Path(folder)
    tensors, header = flatten_model(model)
    shards = split_shards(entries_of(tensors), max_shard_bytes)
    for number, (name, entries) in enumerate(shards.items()):
        write_container(folder / name, entries, (header if not number else Header()).to_metadata(), tensors.__getitem__)
    if len(shards) > 1:
        write_index(folder, shards)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    write_configs(model, folder)


def write_configs(model: Any, folder: Path) -> None:
    """``config.json``, with the method, and the generation config where there is one."""
    if model.can_generate() and model.generation_config is not None:
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = {"quant_method": METHOD}
    config["transformers_version"] = transformers.__version__
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def class_of(folder: Path, who: str) -> tuple[Any, Any]:
    """The class and config that a folder names: a model of transformers itself, never code of the folder.

    Raises:
        ConfigError: If it names none.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        name = (config.architectures or [None])[0]
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"{who}: {str(folder / 'config.json')!r} cannot be used: {first_line(error)}") from error
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ConfigError(f"{who}: {str(folder / 'config.json')!r} names {name!r}, no model of transformers")
    return kind, config


def empty_network(folder: str | os.PathLike[str], who: str) -> Any:
    """The network that a folder's ``config.json`` names, on the meta device.

    Raises:
        ConfigError: If it names no model of transformers.
    """
    return _on_meta(*class_of(Path(folder), who), Path(folder), who)


def _on_meta(kind: Any, config: Any, folder: Path, who: str) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # whatever comes of sizes that make no sense
        raise ConfigError(f"{who}: {str(folder / 'config.json')!r} cannot be used: {first_line(error)}") from error


def from_pretrained(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a folder of :func:`save_pretrained` or ``gblr compress``; no code of the folder is run.

    Args:
        folder: A local folder.
        options: Of transformers' ``from_pretrained``, e.g. ``dtype`` or ``device_map``.

    Returns:
        The model of transformers with frozen structured weights, in evaluation mode.

    Raises:
        ConfigError: If it is not such a folder, or damaged.
    """
    folder = Path(folder)
    kind, config = class_of(folder, "load")
    paths = shard_paths(folder)
    containers = [Container(path) for path in paths]
    header = read_headers(containers)  # refused here with our own message, and there by transformers' machinery
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        raise ConfigError(f"load: {str(folder / 'config.json')!r} does not name the method {METHOD!r} of its files")
    _check_complete(_on_meta(kind, config, folder, "load"), containers, header, folder)
    for container in containers:
        for _name, _tensor in container.read_all():
            pass  # the checksum is compared at the end
        container.close()
    try:
        with quiet_bar():
            model: nn.Module = kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **options)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f"load: {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def _check_complete(network: nn.Module, containers: Sequence[Container], header: Header, folder: Path) -> None:
    """Do the files hold each tensor of the network, in its shape and kind of dtype, and no other.

    transformers would draw at random what is missing. Parts of structured weights are checked where they are put
    together.
    """
    entries = {name: entry for container in containers for name, entry in container.entries.items()}
    separate(network, _tensor_names(entries, header))
    keys = {key for name in header.weights for key in part_names(name)}
    state = network.state_dict(keep_vars=True)
    said = f"load: {str(folder)!r} does not fit the network of its config.json, or is damaged: "
    ours = {*header.weights, *(name for name in state if name.rpartition(".")[0] in header.families)}
    there = {id(tensor) for name, tensor in state.items() if name in entries or name in ours}
    for name, tensor in state.items():
        entry = entries.get(name)
        if id(tensor) not in there and name not in header.torchao:
            raise ConfigError(f"{said}no tensor {name!r}")
        if entry is None or name in ours:
            continue
        shape = tuple(tensor.shape)
        if name.rpartition(".")[0] in header.full and len(shape) == 2:  # of a Conv1D, stored as that of an nn.Linear
            shape = entry.shape if sorted(entry.shape) == sorted(shape) else shape
        if entry.shape != shape or entry.dtype.is_floating_point != tensor.is_floating_point():
            raise ConfigError(f"{said}{name!r} is {entry.dtype} {entry.shape}, the network's {shape}")
    extra = [name for name in entries.keys() - state.keys() - keys if name.rpartition(".")[0] not in header.families]
    if extra and not header.torchao:
        raise ConfigError(f"{said}the network has no {min(extra)!r}")


def _tensor_names(entries: Iterable[str], header: Header) -> list[str]:
    """Names of tensors of the network in its files, with those that are stored in parts."""
    return [*entries, *header.weights, *(f"{name}.weight" for name in header.families)]


@contextlib.contextmanager
def quiet_bar() -> Iterator[None]:
    """Without transformers' progress bar, which is drawn also where nobody watches."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


class _Carrier(nn.Module):
    """Stands where a structured layer will be, while transformers loads the tensors of its weight one by one."""

    def __init__(self, dense: nn.Module, name: str, entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self.dense = [dense]  # in a list: not a submodule
        self.keys = {}
        for key, entry in entries.items():
            place = key.rpartition(".")[2]
            self.keys[place] = key
            self.register_parameter(
                place, nn.Parameter(torch.empty(entry.shape, dtype=entry.dtype, device="meta"), requires_grad=False)
            )
        bias: Any = dense.bias
        self.register_parameter("bias", bias)
        self.name = name
        # Some models initialise the weight of a part themselves; transformers passes over what bears this mark.
        self.__dict__["weight"] = mark_initialised(torch.empty(0))


@register_quantizer(METHOD)
class GBLRHfQuantizer(HfQuantizer):
    """Puts structured weights together when transformers loads a folder, and takes them apart when it saves one."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._header = Header()
        self.flat: tuple[dict[str, Tensor], dict[str, str]] | None = None  # the state to write, where it is at hand

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """A dense model is compressed once it is loaded.

        Raises:
            ConfigError: If the folder is of a dense model, and the config has no budget.
        """
        if not self.pre_quantized and self.quantization_config.budget is None:
            raise ConfigError("gblr: the folder holds a dense model; give its quantization config a budget")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        containers = [Container(path) for path in checkpoint_files or []]
        self._header = read_headers(containers)
        entries = {name: entry for container in containers for name, entry in container.entries.items()}
        for container in containers:
            container.close()
        if self._header.torchao:
            raise ConfigError("load: transformers cannot load weights of torchao and of gblr_plugin from one folder")
        for _, attention in separate(model, _tensor_names(entries, self._header)).values():
            mark_initialised(attention.in_proj_weight)  # some models initialise it themselves
            mark_initialised(attention.in_proj_bias)
        modules = dict(model.named_modules(remove_duplicate=False))
        replacements: dict[int, nn.Module] = {}
        for name in self._header.weights:
            parent, _, last = name.rpartition(".")
            module = modules.get(parent)
            parts = {key: entries[key] for key in part_names(name) if key in entries}
            if module is None or not structurable(module) or last != "weight" or not parts:
                raise ConfigError(f"load: {name!r} is no weight of the network that can be structured")
            replacements[id(module)] = _Carrier(module, name, parts)
        for name in self._header.full:
            module = modules.get(name)
            if module is not None and structurable(module) and not isinstance(module, KINDS):
                rows, cols = weight_matrix(module).shape
                bias = module.bias is not None
                replacements[id(module)] = nn.Linear(cols, rows, bias=bias, device="meta", dtype=module.weight.dtype)
        for name, record in self._header.families.items():
            module = modules.get(name)
            if module is None or not structurable(module):
                raise ConfigError(f"load: {name!r} is no layer that can be structured")
            rows, cols = weight_matrix(module).shape
            replacements[id(module)] = layer_like(module, restore_on_meta(record, name, entries, (rows, cols)))
        replace_modules(model, replacements)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            compress_loaded(model, self.quantization_config)
            return model
        replacements: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, _Carrier):
                replacements[id(module)] = use_kept_matrix(_loaded(module, self._header.record(module.name)))
        replace_modules(model, replacements)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self._header.families:
            family: Any = modules[name]
            family.freeze_factors()
        for name in self._header.full:
            if name in modules:
                as_full(modules[name])
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What transformers' own ``save_pretrained`` writes.

        Raises:
            ConfigError: If the state cannot be saved, see :func:`gblr_plugin.save`, or could not be loaded again.
        """
        return _flat(model) if self.flat is None else self.flat

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Biases and dense layers train on; structured weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def _flat(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model's state, tied ones under each of their names, and the texts of a file's header."""
    tensors, header = flatten_model(model)
    if header.torchao:
        raise ConfigError(
            f"save_pretrained: {min(header.torchao)!r} is quantized by torchao, and transformers cannot load such "
            "weights and those of gblr_plugin from one folder; use gblr_plugin.save"
        )
    aliases = {alias: tensors[name] for alias, name in header.tied.items() if name in tensors}
    return {**tensors, **aliases}, header.to_metadata()


def _loaded(carrier: _Carrier, record: Mapping[str, Any]) -> nn.Module:
    """The plain layer with its structured weight, in the dtype that transformers loads."""
    dense: Any = carrier.dense[0]
    m, n = weight_matrix(dense).shape
    convolution = isinstance(dense, (nn.Conv1d, nn.Conv2d))
    expected = tuple(dense.weight.shape) if convolution else (m, n)
    parts = {key: getattr(carrier, place).detach() for place, key in carrier.keys.items()}
    weight = unflatten_weight(record, parts, carrier.name, expected).to(dense.weight.dtype)
    new: Any = dense if convolution else nn.Linear(n, m, bias=carrier.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = carrier.bias
    new.train(carrier.training)
    return new  # type: ignore[no-any-return]  # a module


# -- transformers' own save_pretrained -------------------------------------------------------------------------------


def _holds_structure(model: nn.Module) -> bool:
    """Does the state of a model need more than its tensors' names to be loaded again.

    A model whose layers are all still in training is saved as it is; one that is converted in part is refused.
    """
    if any(isinstance(parameter.data, GBLRTensor) for parameter in model.parameters()):
        return True
    kinds = [(isinstance(module, GBLRLayer), _is_converted(module)) for module in model.modules()]
    return any(converted for _, converted in kinds) and not any(training for training, _ in kinds)


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, (FamilyLayer, *FULL))


def _quantizer_of(model: Any) -> GBLRHfQuantizer:
    """What gives ``save_pretrained`` the tensors of a model that was converted in memory.

    Everything that can be refused is refused here, before a file or a folder is made.

    Raises:
        ConfigError: If the state cannot be saved, or another method than torchao's has quantized the model.
    """
    before = vars(model).get("hf_quantizer")
    if before is not None and before.quantization_config.quant_method not in (METHOD, "torchao"):
        raise ConfigError(
            f"save_pretrained: the model has structured weights and is quantized by "
            f"{before.quantization_config.quant_method!s}; a folder names one method"
        )
    said = getattr(before, "quantization_config", None)
    quantizer = GBLRHfQuantizer(said if isinstance(said, GBLRHfConfig) else GBLRHfConfig())
    quantizer.flat = _flat(model)
    return quantizer


def _saving_structure(save: Any) -> Any:
    """Transformers' ``save_pretrained``, which asks the model's quantizer for the tensors to write.

    ``from_pretrained`` gives a model that quantizer. A model that was converted in memory has structured weights and
    none; it gets one here, for the time of the call. Names are kept as the model has them, since the record of a
    structured weight holds its name.
    """

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not _holds_structure(self):
            return save(self, save_directory, *args, **kwargs)
        with quantized_by(self, _quantizer_of(self)):
            return save(self, save_directory, *args, **{**kwargs, "save_original_format": False})

    return save_pretrained


wrap_save_pretrained(_saving_structure)
