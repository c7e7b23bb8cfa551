"""The geometry of a family's matrix as plain JSON values; its factors are tensors of the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..families import registry
from ..families.base import FamilyMatrix, Stacked
from ..families.partition import Partition
from .container import Entry

__all__ = ["family_record", "matrix_in_state", "restore_matrix", "restore_on_meta"]


def family_record(matrix: FamilyMatrix) -> dict[str, Any]:
    """What does not train of a matrix: ``{"family": name, field: values}``, or ``{"stacked": [records]}``."""
    if isinstance(matrix, Stacked):
        return {"stacked": [family_record(split) for split in matrix.matrices]}
    record: dict[str, Any] = {"family": matrix.name}
    for field in dataclasses.fields(matrix):  # type: ignore[arg-type]  # every family is a dataclass
        value = getattr(matrix, field.name)
        if isinstance(value, Partition):
            record[field.name] = [value.length, value.count]
        elif not isinstance(value, Tensor):
            record[field.name] = value
    return record


def matrix_in_state(state: Mapping[str, Tensor], name: str, record: Any, shape: tuple[int, int]) -> FamilyMatrix:
    """The matrix of the layer ``name`` in a state dict; otherwise as :func:`restore_matrix`."""
    prefix = f"{name}." if name else ""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return restore_matrix(record, {key: value for key, value in inside.items() if key != "bias"}, shape)


def restore_matrix(record: Any, factors: Mapping[str, Tensor], shape: tuple[int, int]) -> FamilyMatrix:
    """The matrix that :func:`family_record` describes.

    Args:
        record: Record from an untrusted file.
        factors: Its factors by name, as :meth:`FamilyMatrix.factors` gives them.
        shape: (m, n) that it must have.

    Raises:
        ConfigError: If record, factors and shape do not fit together; nothing is allocated by what they claim.
    """
    try:
        matrix = _restore(record, factors, shape)
        if {name: value.shape for name, value in matrix.factors().items()} != {n: f.shape for n, f in factors.items()}:
            raise ValueError("factors left over")
        empty = matrix.to("meta")
        if (
            empty.shape != shape
            or empty.to_dense().shape != shape
            or empty.linear(next(iter(empty.factors().values())).new_empty(2, shape[1])).shape != (2, shape[0])
        ):
            raise ValueError("another shape")
    except Exception as error:  # shapes that do not fit raise many kinds
        raise ConfigError("the record and the factors of a family do not fit together") from error
    return matrix


def restore_on_meta(record: Any, layer: str, entries: Mapping[str, Entry], shape: tuple[int, int]) -> FamilyMatrix:
    """The matrix of a layer in a file whose tensors are not read: its factors are on the meta device.

    Args:
        record: From an untrusted file.
        layer: Name of the layer.
        entries: What the file's header says of the tensors, by name.
        shape: (m, n) that the matrix must have.

    Raises:
        ConfigError: As :func:`restore_matrix`.
    """
    state = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in entries.items()
        if name.startswith(f"{layer}.")
    }
    return matrix_in_state(state, layer, record, shape)


def _restore(record: Any, factors: Mapping[str, Tensor], shape: tuple[int, int]) -> FamilyMatrix:
    m, n = shape
    if "stacked" in record:
        splits = record["stacked"]
        if set(record) != {"stacked"} or not splits or m % len(splits) or any("stacked" in split for split in splits):
            raise ValueError("stack")
        named = [
            {key.removesuffix(f"_{i}"): value for key, value in factors.items() if key.endswith(f"_{i}")}
            for i in range(len(splits))
        ]
        return Stacked(
            tuple(_restore(split, inside, (m // len(splits), n)) for split, inside in zip(splits, named, strict=True))
        )
    kind = registry.get(record["family"])
    known = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # as above
    if "StructuredMatrix" in known.values() or set(record) != {
        "family",
        *(k for k, t in known.items() if t != "Tensor"),
    }:
        raise ValueError("fields")
    values: dict[str, Any] = {}
    for name, annotation in known.items():
        if annotation == "Tensor":
            values[name] = factors[name]
        elif annotation == "Partition":
            values[name] = _partition(record[name], m if name == "rows" else n)
        elif annotation == "Pattern":
            values[name] = _pattern(record[name], values["rows"], values["cols"])
        else:
            values[name] = _sizes(record[name])
    return kind(**values)


def _partition(value: Any, length: int) -> Partition:
    covered, count = value
    if covered != length or type(count) is not int or not 1 <= count <= length:
        raise ValueError("partition")
    return Partition(length, count)


def _pattern(value: Any, rows: Partition, cols: Partition) -> tuple[tuple[int, ...], tuple[int, ...]]:
    row, col = (tuple(indices) for indices in value)
    for indices, count in ((row, rows.count), (col, cols.count)):
        if len(row) != len(col) or any(type(index) is not int or not 0 <= index < count for index in indices):
            raise ValueError("pattern")
    return row, col


def _sizes(value: Any) -> tuple[int, ...]:
    if not 1 <= len(value) <= 2 or any(type(size) is not int or not 1 <= size < 1 << 16 for size in value):
        raise ValueError("sizes")
    return tuple(value)
