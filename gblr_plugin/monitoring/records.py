"""The records that GBLR logs hold: a summary of all layers per step, and the structure of each layer per step.

Both are versioned, self-contained byte strings, so that any TensorBoard data provider can carry them:

    b"GBLR" | version u8 | kind u8 | payload length u32 | zlib(payload) | b"."       all integers little-endian

The closing byte is never zero: numpy strips trailing zeros from byte strings. Only numpy is needed here, so that the
TensorBoard server can read logs without importing torch.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GBLRError

__all__ = [
    "PLUGIN_NAME",
    "STRUCTURE_TAG",
    "SUMMARY_TAG",
    "LayerRecord",
    "LayerShape",
    "RecordError",
    "StepRecord",
    "decode_layer",
    "decode_step",
    "encode_layer",
    "encode_step",
]

PLUGIN_NAME = "gblr"
SUMMARY_TAG = "gblr/summary"
"""Tag of the tensor time series with one :class:`StepRecord` per step."""
STRUCTURE_TAG = "gblr/structure/"
"""With a layer's name: tag of the blob sequences that hold its :class:`LayerRecord`, one a step. A tag per layer, so
that showing one layer touches the records of one layer."""

_MAGIC = b"GBLR"
_VERSION = 1
_STEP, _LAYER = 1, 2
_FRAME = struct.Struct("<4sBBI")
_END = b"."
# Far above any real record; a hostile length must not make the server allocate gigabytes.
_MAX_PAYLOAD = 1 << 27

_ENERGY_STEPS_PER_OCTAVE = 8


class RecordError(GBLRError, ValueError):
    """Bytes that are not a GBLR record of a known version, or are damaged."""


@dataclass(frozen=True)
class LayerShape:
    """What does not change about a layer: its name, matrix and splits.

    Args:
        name: Name of the layer in the model.
        rows: m of its (m, n) matrix.
        cols: n.
        split_sizes: Number of components of each of the s matrices stacked along the rows.
    """

    name: str
    rows: int
    cols: int
    split_sizes: tuple[int, ...]

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense product, m * n."""
        return self.rows * self.cols


@dataclass(frozen=True, eq=False)
class StepRecord:
    """All layers at one step, without their intervals.

    Args:
        layers: L layers.
        stored: (L,) int64 multiply-adds of one product with each layer.
        live: (L,) int64 components that cost anything.
        budget: (L,) float64 relative FLOPs asked for; NaN where there is no budget.
        lambdas: (L,) float64 shrinkage; NaN where unknown.
        sigma: Smoothness of the masks; ``inf`` for the exact boxcar, NaN where unknown.
        loss: Task loss; NaN where unknown.
    """

    layers: tuple[LayerShape, ...]
    stored: NDArray[np.int64]
    live: NDArray[np.int64]
    budget: NDArray[np.float64]
    lambdas: NDArray[np.float64]
    sigma: float
    loss: float


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """The structure of one layer at one step.

    Args:
        shape: Name, matrix and splits; K is the sum of its split sizes.
        row_width: (K,) int64, rows covered; row intervals are cyclic within their split of m / s rows.
        row_start: (K,) int64, first row covered, counted from the top of the split.
        col_width: (K,) int64.
        col_start: (K,) int64.
        energy: (K,) float64 squared Frobenius norm of each block. Stored in steps of an eighth of an octave below the
            largest, i.e. within 4.5%; below 2^-31.75 of the largest it is zero.
    """

    shape: LayerShape
    row_width: NDArray[np.int64]
    row_start: NDArray[np.int64]
    col_width: NDArray[np.int64]
    col_start: NDArray[np.int64]
    energy: NDArray[np.float64]


def encode_step(record: StepRecord) -> bytes:
    """Bytes of a step's summary; about 10 bytes a layer after compression."""
    table = [[layer.name, layer.rows, layer.cols, list(layer.split_sizes)] for layer in record.layers]
    head = json.dumps(table, separators=(",", ":")).encode()
    return _frame(
        _STEP,
        struct.pack("<IIdd", len(head), len(record.layers), record.sigma, record.loss)
        + head
        + record.stored.astype("<i8").tobytes()
        + record.live.astype("<i8").tobytes()
        + record.budget.astype("<f8").tobytes()
        + record.lambdas.astype("<f8").tobytes(),
    )


def decode_step(data: object) -> StepRecord:
    """Inverse of :func:`encode_step`.

    Raises:
        RecordError: If the bytes are foreign, damaged, or of a newer version.
    """
    payload = _Payload(_unframe(data, _STEP))
    head_length, count, sigma, loss = payload.unpack("<IIdd")
    layers = _layer_table(payload.take(head_length))
    if len(layers) != count:
        raise RecordError(f"summary: {count} layers announced, {len(layers)} found")
    stored = payload.array("<i8", count).astype(np.int64)
    live = payload.array("<i8", count).astype(np.int64)
    budget = payload.array("<f8", count).astype(np.float64)
    lambdas = payload.array("<f8", count).astype(np.float64)
    payload.end()
    components = np.array([sum(layer.split_sizes) for layer in layers], dtype=np.int64)
    if (stored < 0).any() or (live < 0).any() or (live > components).any():
        raise RecordError("summary: counts out of range")
    return StepRecord(layers, stored, live, budget, lambdas, sigma, loss)


def encode_layer(record: LayerRecord) -> bytes:
    """Bytes of a layer's structure; at most 9 bytes a component (17 on axes above 65535), usually about half."""
    shape = record.shape
    head = json.dumps([shape.name, shape.rows, shape.cols, list(shape.split_sizes)], separators=(",", ":")).encode()
    size = 2 if max(shape.rows, shape.cols) < 1 << 16 else 4
    top = float(record.energy.max(initial=0.0))
    if not np.isfinite(top):
        # A diverged layer must still be drawn: unknown energies are shown as none.
        top = 0.0
    codes = np.zeros(record.energy.shape, dtype=np.uint8)
    if top > 0:
        ratio = np.clip(np.nan_to_num(record.energy / top), 0.0, 1.0)
        with np.errstate(divide="ignore"):
            codes = np.clip(np.rint(255 + _ENERGY_STEPS_PER_OCTAVE * np.log2(ratio)), 0, 255).astype(np.uint8)
    numbers = np.stack([record.row_width, record.row_start, record.col_width, record.col_start]).astype(f"<u{size}")
    # Bytes of equal weight side by side compress better: high bytes are mostly alike.
    planes = numbers.view(np.uint8).reshape(4, -1, size).transpose(0, 2, 1)
    return _frame(_LAYER, struct.pack("<IBd", len(head), size, top) + head + planes.tobytes() + codes.tobytes())


def decode_layer(data: object) -> LayerRecord:
    """Inverse of :func:`encode_layer`.

    Raises:
        RecordError: If the bytes are foreign, damaged, or of a newer version.
    """
    payload = _Payload(_unframe(data, _LAYER))
    head_length, size, top = payload.unpack("<IBd")
    if size not in (2, 4) or not (np.isfinite(top) and top >= 0):
        raise RecordError("layer: header out of range")
    shape = _layer_shape(_parse_json(payload.take(head_length)))
    count = sum(shape.split_sizes)
    planes = payload.array("u1", 4 * size * count).reshape(4, size, count)
    codes = payload.array("u1", count).astype(np.float64)
    payload.end()
    numbers = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f"<u{size}")[..., 0].astype(np.int64)
    row_length = shape.rows // len(shape.split_sizes)
    for width, start, length in ((*numbers[:2], row_length), (*numbers[2:], shape.cols)):
        if (width > length).any() or (start >= length).any():
            raise RecordError(f"layer {shape.name!r}: intervals out of range")
    energy = np.where(codes > 0, top * np.exp2((codes - 255) / _ENERGY_STEPS_PER_OCTAVE), 0.0)
    row_width, row_start, col_width, col_start = numbers
    return LayerRecord(shape, row_width, row_start, col_width, col_start, energy)


def _frame(kind: int, payload: bytes) -> bytes:
    return _FRAME.pack(_MAGIC, _VERSION, kind, len(payload)) + zlib.compress(payload, 6) + _END


def _unframe(data: object, kind: int) -> bytes:
    if not isinstance(data, bytes) or len(data) < _FRAME.size + 1:
        raise RecordError("not a GBLR record")
    magic, version, found, length = _FRAME.unpack_from(data)
    if magic != _MAGIC:
        raise RecordError("not a GBLR record")
    if version != _VERSION:
        raise RecordError(f"format version {version}; this viewer reads version {_VERSION}")
    if found != kind or length > _MAX_PAYLOAD:
        raise RecordError("record of an unexpected kind or size")
    unpacker = zlib.decompressobj()
    try:
        payload = unpacker.decompress(data[_FRAME.size :], length + 1)
    except zlib.error as error:
        raise RecordError(f"damaged record ({error})") from error
    if len(payload) != length or not unpacker.eof or unpacker.unused_data != _END:
        raise RecordError("damaged record (wrong length)")
    return payload


class _Payload:
    """Reads a payload from front to back, and never past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise RecordError("damaged record (too short)")
        self._at += length
        return self._data[self._at - length : self._at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype=dtype)

    def end(self) -> None:
        if self._at != len(self._data):
            raise RecordError("damaged record (too long)")


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("damaged record (layer table)") from error


def _layer_shape(entry: object) -> LayerShape:
    if not isinstance(entry, list) or len(entry) != 4:
        raise RecordError("damaged record (layer table)")
    name, rows, cols, sizes = entry
    integers = isinstance(sizes, list) and all(type(value) is int for value in (rows, cols, *sizes))
    if not (isinstance(name, str) and integers and sizes and rows > 0 and cols > 0 and min(sizes) >= 0):
        raise RecordError("damaged record (layer table)")
    if max(rows, cols) >= 1 << 32 or sum(sizes) > _MAX_PAYLOAD or rows % len(sizes):
        raise RecordError("damaged record (layer table)")
    return LayerShape(name, rows, cols, tuple(sizes))


@lru_cache(maxsize=256)
def _layer_table(data: bytes) -> tuple[LayerShape, ...]:
    """Steps of a run share their table, so it is parsed once."""
    entries = _parse_json(data)
    if not isinstance(entries, list):
        raise RecordError("damaged record (layer table)")
    return tuple(_layer_shape(entry) for entry in entries)
