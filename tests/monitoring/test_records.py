"""Records survive their way through bytes, stay small, and damaged ones are refused."""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gblr_plugin.monitoring.records import (
    LayerRecord,
    LayerShape,
    RecordError,
    StepRecord,
    _frame,
    _unframe,
    decode_layer,
    decode_step,
    encode_layer,
    encode_step,
)


def make_layer(rows: int, cols: int, sizes: tuple[int, ...], seed: int = 0, name: str = "layer") -> LayerRecord:
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    length = rows // len(sizes)
    return LayerRecord(
        LayerShape(name, rows, cols, sizes),
        rng.integers(0, length + 1, count),
        rng.integers(0, length, count),
        rng.integers(0, cols + 1, count),
        rng.integers(0, cols, count),
        np.exp(rng.normal(0, 3, count)),
    )


def make_step(layers: int = 3) -> StepRecord:
    shapes = tuple(LayerShape(f"h.{i}.fc", 8, 4 + i, (2, 3)) for i in range(layers))
    return StepRecord(
        shapes,
        np.arange(layers) * 7,
        np.arange(layers) % 5,
        np.full(layers, 0.5),
        np.full(layers, math.nan),
        math.inf,
        1.25,
    )


def assert_same_layer(a: LayerRecord, b: LayerRecord) -> None:
    assert a.shape == b.shape
    for name in ("row_width", "row_start", "col_width", "col_start"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(("rows", "cols"), [(12, 7), (65535, 3), (65536, 3), (3, 200_000)])
def test_layer_round_trip(rows: int, cols: int) -> None:
    record = make_layer(rows, cols, (9,))
    back = decode_layer(encode_layer(record))
    assert_same_layer(record, back)
    np.testing.assert_allclose(back.energy, record.energy, rtol=0.045)


@settings(max_examples=60, deadline=None)
@given(
    splits=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    length=st.integers(1, 40),
    cols=st.integers(1, 40),
    seed=st.integers(0, 999),
    name=st.text(max_size=30),
)
def test_layer_round_trip_of_any_shape(splits: list[int], length: int, cols: int, seed: int, name: str) -> None:
    record = make_layer(length * len(splits), cols, tuple(splits), seed, name.encode("utf-8", "ignore").decode())
    assert_same_layer(record, decode_layer(encode_layer(record)))


def test_energies_of_dead_and_diverged_components() -> None:
    record = make_layer(6, 6, (3,))
    for energy, expected in (([0, 1, 4], [0, 1, 4]), ([0, 0, 0], [0, 0, 0]), ([1, math.inf, 2], [0, 0, 0])):
        changed = dataclasses.replace(record, energy=np.array(energy, float))
        np.testing.assert_allclose(decode_layer(encode_layer(changed)).energy, expected, rtol=1e-9)


def test_step_round_trip() -> None:
    record = make_step()
    back = decode_step(encode_step(record))
    assert back.layers == record.layers
    assert back.sigma == math.inf
    assert back.loss == 1.25
    for name in ("stored", "live", "budget", "lambdas"):
        np.testing.assert_array_equal(getattr(back, name), getattr(record, name))


def test_no_layers_at_all() -> None:
    assert decode_step(encode_step(make_step(0))).layers == ()


def test_gpt2_small_snapshot_is_below_a_megabyte() -> None:
    # The worst case: intervals and energies without any pattern to compress. c_attn has three splits.
    shapes = [(2304, 768, (768, 768, 768)), (3072, 768, (768,)), (768, 3072, (768,))] * 12
    total = sum(len(encode_layer(make_layer(m, n, sizes, seed))) for seed, (m, n, sizes) in enumerate(shapes))
    assert total < 1_000_000


@pytest.mark.parametrize("encoded", [encode_layer(make_layer(12, 7, (9,))), encode_step(make_step())])
def test_every_truncation_and_flipped_byte_is_refused_or_harmless(encoded: bytes) -> None:
    decode = decode_layer if encoded[5] == 2 else decode_step
    for length in range(len(encoded)):
        with pytest.raises(RecordError):
            decode(encoded[:length])
    for at in range(len(encoded)):
        with pytest.raises(RecordError):
            decode(encoded[:at] + bytes([encoded[at] ^ 0x5A]) + encoded[at + 1 :])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GBLR record"),
        ("text", "not a GBLR record"),
        (b"PNG" * 20, "not a GBLR record"),
        (b"GBLR\x02\x02" + bytes(20), "version 2"),
        (b"GBLR\x01\x01" + bytes(20), "unexpected kind"),
        (b"GBLR\x01\x02\xff\xff\xff\xff" + bytes(20), "unexpected kind or size"),
    ],
)
def test_foreign_bytes_are_named(data: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode_layer(data)


def test_a_small_record_cannot_unpack_into_a_large_one() -> None:
    bomb = struct.pack("<4sBBI", b"GBLR", 1, 2, 50) + zlib.compress(bytes(10_000_000)) + b"."
    with pytest.raises(RecordError, match="wrong length"):
        decode_layer(bomb)


def test_out_of_range_intervals_are_refused() -> None:
    record = make_layer(12, 7, (9,))
    wide = dataclasses.replace(record, row_width=record.row_width + 50)
    with pytest.raises(RecordError, match="intervals out of range"):
        decode_layer(encode_layer(wide))


def reframed(encoded: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A record whose content is another, framed and compressed as if it were meant so."""
    kind = encoded[5]
    return _frame(kind, change(_unframe(encoded, kind)))


STEP, LAYER = encode_step(make_step()), encode_layer(make_layer(12, 7, (9,)))


def table(text: bytes, count: int = 1) -> bytes:
    body = struct.pack("<IIdd", len(text), count, 1.0, 0.0) + text
    return _frame(STEP[5], body + bytes(32 * count))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reframed(STEP, lambda body: body[:-1]), "too short"),
        (reframed(STEP, lambda body: body + b"0"), "too long"),
        (reframed(STEP, lambda body: body[:4] + struct.pack("<I", 2) + body[8:]), "2 layers announced, 3 found"),
        (reframed(STEP, lambda body: struct.pack("<I", 1 << 30) + body[4:]), "too short"),
        (encode_step(dataclasses.replace(make_step(), stored=np.array([1, -1, 1]))), "counts out of range"),
        (encode_step(dataclasses.replace(make_step(), live=np.array([1, -1, 1]))), "counts out of range"),
        (encode_step(dataclasses.replace(make_step(), live=np.array([1, 6, 1]))), "counts out of range"),
        (table(b"{}"), "layer table"),
        (table(b"[3]"), "layer table"),
        (table(b"[[]]"), "layer table"),
        (table(b"[["), "layer table"),
        (table(b"[" * 100_000), "layer table"),
        (table(b"[[5, 8, 4, [2]]]"), "layer table"),
        (table(b'[["a", 8.0, 4, [2]]]'), "layer table"),
        (table(b'[["a", true, 4, [2]]]'), "layer table"),
        (table(b'[["a", 8, 4, 2]]'), "layer table"),
        (table(b'[["a", 8, 4, []]]'), "layer table"),
        (table(b'[["a", 8, 0, [2]]]'), "layer table"),
        (table(b'[["a", 8, 4, [2, -1]]]'), "layer table"),
        (table(b'[["a", 8, 4, [2, 1, 1]]]'), "layer table"),  # 8 rows in three parts
        (table(b'[["a", 8, 4294967296, [2]]]'), "layer table"),
        (table(b'[["a", 8, 4, [4294967296]]]'), "layer table"),
    ],
)
def test_summaries_that_lie(data: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode_step(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body[:4] + b"\x03" + body[5:], "header out of range"),
        (lambda body: body[:5] + struct.pack("<d", math.nan) + body[13:], "header out of range"),
        (lambda body: body[:5] + struct.pack("<d", -1.0) + body[13:], "header out of range"),
        (lambda body: body + b"0", "too long"),
        (lambda body: body.replace(b"[9]", b"[8]"), "too long"),
        (lambda body: body.replace(b"[9]", b"99]"), "layer table"),
        (lambda body: body.replace(b",7,", b",1,"), "intervals out of range"),
    ],
)
def test_layers_that_lie(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode_layer(reframed(LAYER, change))
