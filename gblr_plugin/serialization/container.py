"""Writes safetensors files, one tensor at a time, completely or not at all; reads them and checks all their claims."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..utils.files import replacing, write_text

__all__ = [
    "INDEX",
    "Container",
    "Entry",
    "entries_of",
    "shard_paths",
    "split_shards",
    "write_container",
    "write_index",
]

INDEX = "model.safetensors.index.json"
"""Name of the index of a sharded folder, as Hugging Face writes it."""

_CHECKSUM = "gblr_crc32"
_HEADER_CHECKSUM = "gblr_header_crc32"  # checksum of the header's text, with zeros in its place
_ZEROS = "0" * 8
_MAX_INDEX_BYTES = 100_000_000  # as safetensors limits its headers
_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Entry(NamedTuple):
    """What a header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What headers say about these tensors."""
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_container(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file that also holds checksums of its data and header, one tensor in memory at a time.

    Args:
        path: Written whole or not at all.
        entries: What will be written.
        metadata: Texts of the header.
        read: Called once for each name, in the order of the file; returns the tensor, on any device.

    Raises:
        ConfigError: If a dtype has no place in such files.
        OSError: If the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, _CHECKSUM: _ZEROS, _HEADER_CHECKSUM: _ZEROS}}
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # wide first: all lie aligned
    at = 0
    for name in order:
        entry = entries[name]
        if entry.dtype not in _NAMES:
            raise ConfigError(f"save: {name!r} has dtype {entry.dtype}, which safetensors files do not hold")
        end = at + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum = 0
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = read(name).detach()
            if (tensor.dtype, tuple(tensor.shape)) != entries[name]:
                raise ValueError(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, announced were {entries[name]}")
            data = _bytes(tensor)
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        text = _with_value(text, _CHECKSUM, f"{checksum:08x}")
        file.seek(8)
        file.write(_with_value(text, _HEADER_CHECKSUM, f"{zlib.crc32(text):08x}"))


def _with_value(text: bytes, key: str, value: str) -> bytes:
    """A header with another text of eight characters at one key of its metadata."""
    at = text.index(f'"{key}":"'.encode()) + len(key) + 4
    return text[:at] + value.encode() + text[at + 8 :]


def _check_header(path: str, found: str) -> None:
    """Raise a ValueError unless the header's text has this checksum."""
    with open(path, "rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))  # sound, as the file could be opened
    if f"{zlib.crc32(_with_value(text, _HEADER_CHECKSUM, _ZEROS)):08x}" != found:
        raise ValueError("its header does not match its checksum")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(data)


class Container:
    """One open safetensors file, whose header is sound and whose data is complete.

    Args:
        path: The file.
        who: First word of error messages.

    Attributes:
        entries: What it holds, by name, in the order of the file.
        metadata: Texts of its header.

    Raises:
        ConfigError: If it is missing, unreadable, cut short, altered in its header, or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str], who: str = "load") -> None:
        import safetensors

        self.path, self._who = os.fspath(path), who
        try:
            # `pread` copies: a mapped file that someone cuts short would crash the process later.
            opened: Any = safetensors.safe_open(self.path, framework="pt", backend="pread")
            self._file = opened.__enter__()
            self.metadata: dict[str, str] = self._file.metadata() or {}
            if _HEADER_CHECKSUM in self.metadata:  # files of before have none
                _check_header(self.path, self.metadata[_HEADER_CHECKSUM])
            names = self._file.offset_keys()
            slices = {name: self._file.get_slice(name) for name in names}
            self.entries = {
                name: Entry(_DTYPES[tensor.get_dtype()], tuple(tensor.get_shape())) for name, tensor in slices.items()
            }
        except FileNotFoundError as error:
            raise ConfigError(f"{who}: no file at {self.path!r}") from error
        except (PermissionError, IsADirectoryError) as error:
            raise ConfigError(f"{who}: cannot read {self.path!r}: {error.strerror}") from error
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, OverflowError) as error:
            raise ConfigError(f"{who}: {self.path!r} is damaged, or not a file of weights") from error

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read_all(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of the file; at the end the checksum is compared, where there is one.

        Raises:
            ConfigError: If the data was altered.
        """
        checksum = 0
        for name in self.entries:
            tensor = self.read(name)
            checksum = zlib.crc32(_bytes(tensor), checksum)
            yield name, tensor
        if self.metadata.get(_CHECKSUM, f"{checksum:08x}") != f"{checksum:08x}":
            raise ConfigError(f"{self._who}: {self.path!r} is damaged: its data does not match its checksum")

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__(None, None, None)


def split_shards(entries: Mapping[str, Entry], most: int) -> dict[str, dict[str, Entry]]:
    """Tensors by file, in their order, each file at most ``most`` bytes (or one tensor)."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.nbytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Entry]]) -> None:
    """The index of a sharded folder."""
    total = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    weight_map = {name: file for file, entries in shards.items() for name in entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def shard_paths(folder: str | os.PathLike[str], who: str = "load") -> list[Path]:
    """The safetensors files of a folder in the Hugging Face layout: one file, or those that the index names.

    Raises:
        ConfigError: If there are none, or the index is damaged or names a file outside the folder.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ConfigError(f"{who}: no model.safetensors or {INDEX} in {str(folder)!r}")
        return [single]
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        names: Iterable[Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted(set(names))
        if not files:
            raise ValueError("empty")
    except OSError as error:
        raise ConfigError(f"{who}: cannot read {str(index)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{who}: {str(index)!r} is damaged, or not an index of shards") from error
    for name in files:
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & {"/", "\\", "\0", ":"}:
            raise ConfigError(f"{who}: {str(index)!r} names {name!r}; allowed are .safetensors files of its own folder")
    return [folder / name for name in files]
