"""What saved files hold, weight by weight: structure, bytes and kernels, read from their headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from ..errors import ConfigError
from ..kernels.plan import Plan
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.tables import table
from .container import Container, Entry
from .header import Header, read_headers
from .weights import part_names, unflatten_weight

__all__ = ["Contents", "StoredWeight", "inspect_files", "read_weights"]

_WHO = "inspect"


@dataclass(frozen=True)
class StoredWeight:
    """A weight that was compressed.

    Args:
        name: Of the layer, or of the weight where it is no layer's.
        structure: ``"gblr"``, a family's name, ``"full"`` (stored dense, since its structure was no cheaper) or
            ``"quantized"`` (by torchao).
        shape: Of the dense weight; empty where the file does not say.
        components: Number of rank-1 blocks; 0 where the structure has none.
        entries: Stored entries of its factors, or of the dense matrix.
        nbytes: Bytes in the file.
        dtype: Of the factors.
        kernels: The kernel for each number of tokens, by the plan; empty where there is none.
    """

    name: str
    structure: str
    shape: tuple[int, ...]
    components: int
    entries: int
    nbytes: int
    dtype: str
    kernels: str = ""

    @property
    def relative_flops(self) -> float | None:
        """Stored entries over those of the dense weight, which are multiply-adds; ``None`` without its shape."""
        return self.entries / prod(self.shape) if self.shape else None


@dataclass(frozen=True)
class Contents:
    """What the files of a model hold.

    Args:
        weights: The compressed weights, by name.
        dense_bytes: Bytes of all other tensors: dense weights, embeddings, biases.
        dense_tensors: Their number.
        file_bytes: Bytes of the files.
    """

    weights: tuple[StoredWeight, ...]
    dense_bytes: int
    dense_tensors: int
    file_bytes: int

    def to_json(self) -> str:
        """JSON text."""
        weights = [{**asdict(weight), "relative_flops": weight.relative_flops} for weight in self.weights]
        return json.dumps({**asdict(self), "weights": weights}, indent=2)

    def __str__(self) -> str:
        """A table of the weights."""
        rows = [
            (
                weight.name,
                weight.structure,
                " x ".join(map(str, weight.shape)),
                str(weight.components or ""),
                "" if weight.relative_flops is None else f"{weight.relative_flops:.1%}",
                f"{weight.nbytes / 1024:,.1f}",
                weight.dtype,
                weight.kernels,
            )
            for weight in self.weights
        ]
        header = ("weight", "structure", "shape", "components", "FLOPs", "KiB", "dtype", "kernels")
        stored = sum(weight.nbytes for weight in self.weights)
        lines = table(header, rows, left=(0, 1, 6, 7)) if rows else ["no compressed weight"]
        return "\n".join(
            [
                *lines,
                f"{len(rows)} compressed weights in {stored / 1024:,.1f} KiB, {self.dense_tensors} other tensors in "
                f"{self.dense_bytes / 1024:,.1f} KiB; files of {self.file_bytes / 1024:,.1f} KiB",
            ]
        )


def inspect_files(paths: Sequence[str | os.PathLike[str]]) -> Contents:
    """Read the headers of the files of one model.

    Args:
        paths: Files of :func:`gblr_plugin.save`, or the shards of a folder.

    Raises:
        ConfigError: If one is missing, damaged or not of this format.
    """
    with _opened(paths) as (containers, header):
        entries = {name: entry for container in containers for name, entry in container.entries.items()}
    taken: set[str] = set()
    weights = [*_structured(header, entries, taken), *_families(header, entries, taken)]
    for name in header.full:
        weights.append(_plain(name, "full", entries, [f"{name}.weight"], taken))
    for name in header.torchao:
        inside = [key for key in entries if key.startswith(f"{name}_") or key == name]
        weights.append(_plain(name, "quantized", entries, inside, taken))
    others = [entry for name, entry in entries.items() if name not in taken]
    return Contents(
        tuple(weights), sum(entry.nbytes for entry in others), len(others), sum(os.path.getsize(path) for path in paths)
    )


def read_weights(paths: Sequence[str | os.PathLike[str]]) -> dict[str, GBLRTensor]:
    """The GBLR weights of the files by the names of their layers, in the files' order; those stored dense left out.

    Raises:
        ConfigError: If a file cannot be read, or a weight is damaged.
    """
    with _opened(paths) as (containers, header):
        places = {name: container for container in containers for name in container.entries}
        found = {}
        for name in header.weights:
            record = header.record(name)
            parts = {key: places[key].read(key) for key in part_names(name) if key in places}
            if not record.get("dense", False):
                found[name.removesuffix(".weight")] = unflatten_weight(record, parts, name)
    return found


@contextmanager
def _opened(paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[list[Container], Header]]:
    with ExitStack() as undo:
        containers = []
        for path in paths:
            containers.append(Container(path, _WHO))
            undo.callback(containers[-1].close)
        yield containers, read_headers(containers, _WHO)


def _structured(header: Header, entries: dict[str, Entry], taken: set[str]) -> Iterator[StoredWeight]:
    for name in header.weights:
        record = header.record(name)
        factors, intervals, _ = part_names(name)
        parts = [key for key in part_names(name) if key in entries]
        taken.update(parts)
        shape = record.get("shape")
        if factors not in parts or not isinstance(shape, list):
            raise ConfigError(f"{_WHO}: the record or the tensors of {name!r} do not fit together")
        yield StoredWeight(
            name=name.removesuffix(".weight"),
            structure="full" if record.get("dense", False) else "gblr",
            shape=tuple(shape),
            components=entries[intervals].shape[-1] if intervals in parts else 0,
            entries=prod(entries[factors].shape),
            nbytes=sum(entries[key].nbytes for key in parts),
            dtype=_name(entries[factors]),
            kernels=_kernels(record["plan"]),
        )


def _families(header: Header, entries: dict[str, Entry], taken: set[str]) -> Iterator[StoredWeight]:
    for name, record in header.families.items():
        inside = [key for key in entries if key.startswith(f"{name}.") and key != f"{name}.bias"]
        first: Any = record["stacked"][0] if record.get("stacked") else record
        yield _plain(name, str(first.get("family", "")), entries, inside, taken)


def _plain(name: str, structure: str, entries: dict[str, Entry], keys: list[str], taken: set[str]) -> StoredWeight:
    """A weight that the file stores as the tensors of these names."""
    inside = [entries[key] for key in keys if key in entries]
    taken.update(keys)
    shape = inside[0].shape if structure == "full" and inside else ()
    dtype = _name(inside[0]) if inside else ""
    count, size = sum(prod(entry.shape) for entry in inside), sum(entry.nbytes for entry in inside)
    return StoredWeight(name.removesuffix(".weight"), structure, shape, 0, count, size, dtype)


def _name(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _kernels(record: dict[str, Any]) -> str:
    """Such as ``"dense to 4 tokens, compiled"``: a kernel serves as many tokens, and the last one all more."""
    plan = Plan.from_dict(record)
    spans: list[tuple[int, str]] = []
    for limit, name in plan.kernels:
        if spans and spans[-1][1] == name:
            spans.pop()
        spans.append((limit, name))
    return ", ".join([*(f"{name} to {limit} tokens" for limit, name in spans[:-1]), spans[-1][1]])
