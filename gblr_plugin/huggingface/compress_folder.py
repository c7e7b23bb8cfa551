"""Compress a folder of safetensors layer by layer: also models larger than memory, by several processes.

Each layer's result is a small file until the shard that it belongs to is written. An interrupted command that is
started again finds these files and goes on. A layer's result depends on its weight and the settings alone, so that
neither an interruption nor the number of processes changes the output.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from ..decomposition import METHODS, decompose
from ..errors import ConfigError
from ..families.layers import FamilyLayer
from ..families.registry import get
from ..layers.dense import structurable, weight_matrix
from ..layers.separation import is_packed
from ..serialization.container import Container, Entry, entries_of, shard_paths, write_container, write_index
from ..serialization.families import family_record, restore_on_meta
from ..serialization.header import Header, read_headers
from ..serialization.weights import flatten_weight, plan_record
from ..surgery.conversion import frozen_layer, frozen_like
from ..surgery.layer_settings import FamilySettings, structured_from
from ..surgery.matrices import weight_matrices
from ..surgery.row_splits import RowSplits, check_row_splits_given, row_splits_of
from ..surgery.selection import Skipped, log_skipped, select_layers
from ..tensor.gblr_tensor import FACTOR_DTYPES, GBLRTensor
from ..utils.files import write_text
from ..utils.progress import track
from ..utils.unfinished import WORK, begin_work, end_work
from ..utils.validation import check_choice, check_count, check_share
from .companions import copy_companions

__all__ = ["CompressSettings", "CompressSummary", "compress_folder"]

_WHO = "compress"
_OF_GBLR = {"method": "gblr", "align": 1, "seed": 0, "factor_dtype": None}  # with their defaults
_PACKED = "attention packs its projections in one parameter, which is left as it is where no data are given"
_PATIENCE = timedelta(days=365)  # for which a process waits for the others


@dataclass(frozen=True)
class CompressSettings:
    """How layers are compressed.

    Args:
        budget: Relative FLOPs of each layer, in (0, 1].
        include: Full names, glob patterns or type names; ``None`` for every layer that can gain, see
            :func:`~gblr_plugin.surgery.selection.select_layers`. What stays dense is logged with the reason.
        exclude: Patterns of layers that stay dense all the same.
        method: As :func:`gblr_plugin.decompose` takes it.
        align: Tile of rows and columns to which intervals snap.
        row_splits: Matrices packed in the rows (packed query, key, value: 3), for all layers or by pattern, see
            :func:`~gblr_plugin.surgery.row_splits.row_splits_of`.
        seed: Seed of random draws.
        factor_dtype: ``None`` keeps that of the weight; ``"int8"`` rounds factors.
        family: Name of a structure family, see :func:`~gblr_plugin.families.names`, onto which each layer is projected
            at ``budget``; all that is saved is as :func:`gblr_plugin.convert` makes it of a layer of the family.
            ``method``, ``align``, ``seed`` and ``factor_dtype`` are left out with it. ``None``: GBLR as they say.

    Raises:
        ConfigError: If a value is out of range, there is no such family, or it is given with settings of GBLR alone.
    """

    budget: float
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    method: str = "gblr"
    align: int = 1
    row_splits: RowSplits = 1
    seed: int = 0
    factor_dtype: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        check_share(f"{_WHO}: budget", self.budget, "relative FLOPs")
        check_choice(f"{_WHO}: method", self.method, METHODS)
        check_count(f"{_WHO}: align", self.align)
        check_row_splits_given(f"{_WHO}: row_splits", self.row_splits)
        if self.factor_dtype not in FACTOR_DTYPES:
            raise ConfigError(f"{_WHO}: factor_dtype must be None or 'int8', got {self.factor_dtype!r}")
        if self.family is not None:
            get(self.family)
            given = next((name for name, default in _OF_GBLR.items() if getattr(self, name) != default), None)
            if given is not None:
                raise ConfigError(f"{_WHO}: {given} is of GBLR alone; leave it or family {self.family!r} out")


@dataclass(frozen=True)
class CompressSummary:
    """What came out.

    Args:
        layers: Number of layers compressed.
        relative_flops: Relative FLOPs of these layers together.
        bytes_before: Bytes of the source's weights.
        bytes_after: Bytes of the output's weights.
    """

    layers: int
    relative_flops: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers at relative FLOPs {self.relative_flops:.4f}; weights "
            f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after"
        )


@dataclass(frozen=True)
class _Layer:
    name: str
    shape: tuple[int, int]  # of its weight matrix
    row_splits: int
    key: str  # of its weight in the source
    shard: Path
    result: Path  # where its result waits


def compress_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: CompressSettings,
    *,
    model: nn.Module | None = None,
) -> CompressSummary | None:
    """Compress the layers of a folder in the Hugging Face layout, one layer in memory at a time.

    Started by ``torchrun`` the processes take layers in turn, then shards. Interrupted, even killed, and started again
    with the same arguments (on any number of processes) it goes on with what is missing.

    Args:
        source: Folder with ``model.safetensors`` or shards and their index.
        output: Folder with shards of the same names, their index, ``config.json`` (written last) and whatever else lies
            in the source, for :func:`gblr_plugin.load`.
        settings: What to compress, and how.
        model: The dense network, best on the meta device; default what the source's ``config.json`` names.

    Returns:
        What came out; ``None`` on all processes but the first.

    Raises:
        ConfigError: If source and network do not fit together, nothing is selected, or the output holds something
            else.
        OSError: If a file cannot be written.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise ConfigError(f"{_WHO}: no folder at {str(source)!r}")
    if source.resolve() == output.resolve():
        raise ConfigError(f"{_WHO}: source and output are the same folder")
    shards = shard_paths(source, _WHO)
    network = model
    if network is None:
        from .folders import empty_network  # needs transformers

        network = empty_network(source, _WHO)
    names, tied = _names_of(network, {path: _entries(path) for path in shards}, source)
    layers, skipped = _select(network, settings, names, output / WORK)
    modules = dict(network.named_modules(remove_duplicate=False))
    with _together() as (rank, processes, wait):
        if rank == 0:
            _begin(source, output, settings, shards, layers)
            log_skipped(skipped)
        wait()
        mine = layers[rank::processes]  # by number, not by what is missing, which the others change meanwhile
        todo = [layer for layer in mine if not layer.result.exists() and not (output / layer.shard.name).exists()]
        for layer in track(todo, "decomposing"):
            _decompose(modules[layer.name], layer, settings)
        wait()
        for shard in track([path for path in shards[rank::processes] if not (output / path.name).exists()], "writing"):
            inside = [layer for layer in layers if layer.shard == shard]
            _write_shard(shard, output / shard.name, names[shard], inside, tied)
        wait()
    return _finish(source, output, shards, layers, model is None) if rank == 0 else None


# -- several processes -----------------------------------------------------------------------------------------------


@contextmanager
def _together() -> Iterator[tuple[int, int, Callable[[], object]]]:
    """This process's number, how many there are as torchrun tells, and how each waits for all others.

    They wait in a group of their own: the usual one gives up after half an hour, and processes may end further apart. A
    process that ends takes the connections of those that wait for it along, so that they end too.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield 0, 1, lambda: None
        return
    group: Any = dist.group.WORLD if started else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank(), dist.get_world_size(), partial(dist.barrier, group)
    finally:
        dist.destroy_process_group(group)


# -- what there is ---------------------------------------------------------------------------------------------------


def _entries(path: Path) -> dict[str, Entry]:
    container = Container(path, _WHO)
    container.close()
    if "gblr" in container.metadata:
        raise ConfigError(f"{_WHO}: {str(path)!r} is of a compressed model")
    return container.entries


def _names_of(
    network: nn.Module, files: Mapping[Path, Mapping[str, Entry]], source: Path
) -> tuple[dict[Path, dict[str, str]], dict[str, str]]:
    """For each file, the network's name of each of its tensors; tensors that the network lacks are left out.

    A checkpoint of a network's body names its tensors without the body's prefix, and one of a network with a head may
    be read for its body alone.

    The second table is of tied tensors: names that no file has, each with the name by which a file has the tensor.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict(keep_vars=True).items()}
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    found: dict[Path, dict[str, str]] = {}
    for path, entries in files.items():
        found[path] = {}
        for key, entry in entries.items():
            name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in shapes), None)
            if name is None:
                continue
            if shapes[name] != entry.shape:
                raise ConfigError(
                    f"{_WHO}: {str(path)!r}: {key!r} has shape {entry.shape}, the network's {name!r} has {shapes[name]}"
                )
            found[path][key] = name
    there = {name for names in found.values() for name in names.values()}
    first: dict[int, str] = {}
    state = network.state_dict(keep_vars=True)
    for name in sorted(state, key=lambda n: n not in there):
        first.setdefault(id(state[name]), name)
    missing = [name for name, tensor in state.items() if first[id(tensor)] not in there]
    if missing:
        raise ConfigError(f"{_WHO}: {str(source)!r} has no tensor {missing[0]!r}, which the network needs")
    return found, {name: first[id(tensor)] for name, tensor in state.items() if name not in there}


def _select(
    network: nn.Module, settings: CompressSettings, names: Mapping[Path, Mapping[str, str]], work: Path
) -> tuple[list[_Layer], list[Skipped]]:
    selection = select_layers(network, settings.include, settings.exclude)
    total = sum(matrix.entries for matrix in weight_matrices(network))
    packed = {
        name: Skipped(name, _PACKED, weight_matrix(module).numel() / total)
        for name, module in selection.layers.items()
        if is_packed(network.get_submodule(name.rpartition(".")[0]))
    }
    chosen = {name: module for name, module in selection.layers.items() if name not in packed}
    splits_of = row_splits_of(network, chosen, settings.row_splits)
    places = {name: (path, key) for path, inside in names.items() for key, name in inside.items()}
    layers = []
    for number, (name, module) in enumerate(chosen.items()):
        (rows, cols), splits = weight_matrix(module).shape, splits_of[name]
        if rows % splits:
            raise ConfigError(f"layer {name!r}: row_splits {splits} does not divide its {rows} rows")
        if settings.family is not None:
            try:
                get(settings.family).layer_options(module)
            except ConfigError as error:
                raise ConfigError(f"layer {name!r}: {error}") from error
        path, key = places[f"{name}.weight"]
        layers.append(_Layer(name, (rows, cols), splits, key, path, work / f"{number:06d}.safetensors"))
    return layers, [*selection.skipped, *packed.values()]


def _begin(
    source: Path, output: Path, settings: CompressSettings, shards: Iterable[Path], layers: Iterable[_Layer]
) -> None:
    """Note what is being done, or see that it is what was begun."""
    task = {
        "settings": asdict(settings),
        "layers": [layer.name for layer in layers],
        "source": {path.name: [path.stat().st_size, _header_checksum(path)] for path in shards},
    }
    begin_work(output, task, _WHO)


def _header_checksum(path: Path) -> int:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return zlib.crc32(file.read(min(size, 100_000_000)))


# -- the work --------------------------------------------------------------------------------------------------------


def _decompose(module: Any, layer: _Layer, settings: CompressSettings) -> None:
    """One layer's weight, compressed, into a file of its own."""
    container = Container(layer.shard, _WHO)
    empty = module.weight
    try:
        module.weight = nn.Parameter(container.read(layer.key), requires_grad=False)
        container.close()
        if not structurable(module):
            raise ConfigError("it cannot be structured")
        frozen = _frozen(module, layer, settings)
    except ConfigError as error:
        raise ConfigError(f"layer {layer.name!r}: {error}") from error
    finally:
        module.weight = empty
    header, name = Header(), f"{layer.name}.weight"
    tensors: dict[str, Tensor]
    if isinstance(frozen, FamilyLayer):
        tensors = {f"{layer.name}.{key}": factor for key, factor in frozen.frozen_matrix().factors().items()}
        header.families[layer.name] = family_record(frozen.geometry)
    elif isinstance(weight := frozen.weight.data, GBLRTensor):
        tensors, record = flatten_weight(name, weight)
        header.weights[name] = {**record, "plan": header.number_of(plan_record(weight.plan))}
    else:
        tensors = {name: weight}
        header.full.append(layer.name)
    write_container(layer.result, entries_of(tensors), header.to_metadata(), tensors.__getitem__)


def _frozen(module: Any, layer: _Layer, settings: CompressSettings) -> Any:
    """The converted layer in place of a dense one."""
    if settings.family is not None:
        trained = structured_from(module, FamilySettings(settings.family, settings.budget, layer.row_splits))
        return frozen_layer(trained, trained.frozen_structure())
    matrix = decompose(
        weight_matrix(module),
        settings.budget,
        method=settings.method,
        align=settings.align,
        row_splits=layer.row_splits,
        seed=settings.seed,
    )
    return frozen_like(module, matrix, factor_dtype=settings.factor_dtype)


def _write_shard(
    source: Path, output: Path, names: Mapping[str, str], layers: Iterable[_Layer], tied: Mapping[str, str]
) -> None:
    """A shard with its layers' results in place of their weights; one tensor in memory at a time."""
    compressed = {layer.key: layer for layer in layers}
    dense = Container(source, _WHO)
    places: dict[str, tuple[Container, str]] = {}
    results = []
    for key, name in names.items():
        if key not in compressed:
            places[name] = dense, key
            continue
        result = Container(compressed[key].result, _WHO)
        results.append(result)
        places.update({inside: (result, inside) for inside in result.entries})
    entries = {name: container.entries[key] for name, (container, key) in places.items()}

    def read(name: str) -> Tensor:
        container, key = places[name]
        return container.read(key)

    header = read_headers(results, _WHO)
    for alias, name in tied.items():
        if name in names.values():
            first, other = name.removesuffix("weight"), alias.removesuffix("weight")
            factors = [key for key in entries if key.startswith(first)] if first[:-1] in header.families else [name]
            header.tied.update({other + key.removeprefix(first): key for key in factors})
    write_container(output, entries, header.to_metadata(), read)
    for container in (dense, *results):
        container.close()


def _finish(
    source: Path, output: Path, shards: list[Path], layers: list[_Layer], transformers_model: bool
) -> CompressSummary:
    """Index, other files and the config; then the work is no longer needed."""
    containers = [Container(output / path.name, _WHO) for path in shards]
    files = {path.name: container.entries for path, container in zip(shards, containers, strict=True)}
    families = read_headers(containers, _WHO).families
    for container in containers:
        container.close()
    before = {path: _entries(path) for path in shards}
    after = {name: entry for entries in files.values() for name, entry in entries.items()}
    multiply_adds = 0
    for layer in layers:
        name = f"{layer.name}.weight"
        if layer.name in families:
            multiply_adds += restore_on_meta(families[layer.name], layer.name, after, layer.shape).multiply_adds
        else:
            multiply_adds += prod((after.get(f"{name}_factors") or after[name]).shape)
    if len(shards) > 1:
        write_index(output, files)
    copy_companions(source, output)
    if transformers_model:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {"quant_method": "gblr"}
        write_text(output / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    end_work(output / WORK)
    return CompressSummary(
        len(layers),
        multiply_adds / sum(prod(layer.shape) for layer in layers),
        sum(entry.nbytes for entries in before.values() for entry in entries.values()),
        sum(entry.nbytes for entry in after.values()),
    )
