"""Altered and malicious files: everything is refused in one line, and nothing is allocated by what they claim."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError, convert, families, load, prepare, save
from gblr_plugin.families.layers import trainable
from gblr_plugin.serialization import read_state
from gblr_plugin.serialization.container import INDEX, Container, entries_of, shard_paths, write_container
from gblr_plugin.serialization.families import family_record, restore_matrix
from gblr_plugin.serialization.weights import unflatten_weight
from gblr_plugin.surgery.layer_settings import LayerSettings


def make():
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 20, bias=False))


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    model = make()
    prepare(model, ["0"], settings=LayerSettings("pursuit", budget=0.5))
    gblr.prepare(model, ["2"], family="block_sparse", budget=0.9)
    save(gblr.convert(model.eval()), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def parts(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["gblr"]), data[8 + size :]


def write(path, header, said, data, checksum=False):
    header["__metadata__"]["gblr"] = json.dumps(said)
    header["__metadata__"].pop("gblr_header_crc32", None)
    if not checksum:
        del header["__metadata__"]["gblr_crc32"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(path, network=make):
    with pytest.raises(ConfigError) as caught:
        load(path, network)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("load: ")
    assert str(path) in message
    return message


def test_written_files_are_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).t(),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.zeros(0, 4, dtype=torch.bfloat16),
        "d": torch.tensor([True, False]),
        "e": torch.arange(7, dtype=torch.uint8),
    }
    write_container(tmp_path / "t.safetensors", entries_of(tensors), {"note": "é"}, tensors.__getitem__)
    again = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
    container = Container(tmp_path / "t.safetensors")
    assert container.metadata["note"] == "é"
    assert {name for name, _ in container.read_all()} == set(tensors)
    assert read_state(tmp_path / "t.safetensors", "weights").keys() == tensors.keys()


def test_a_failing_write_leaves_nothing(tmp_path):
    def broken(name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_container(tmp_path / "t.safetensors", entries_of({"a": torch.ones(2)}), {}, broken)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02"])
def test_a_length_that_looks_like_another_format(path, start):
    header, said, data = parts(path)
    said["full"] = [""]
    write(path, header, said, data)
    missing = int.from_bytes(start, "little") - int.from_bytes(path.read_bytes()[:8], "little")
    while missing < 0:
        missing += 1 << 16
    said["full"] = ["x" * missing]
    header["__metadata__"]["gblr_crc32"] = ""
    write(path, header, said, data)
    assert path.read_bytes().startswith(start)
    assert type(load(path, make)) is type(make())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "damaged" in refused(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_noticed(path, at, bit):
    data = bytearray(path.read_bytes())
    changed = bytearray(data)
    changed[int(at * len(data))] ^= 1 << bit
    altered = path.with_name("altered.safetensors")
    altered.write_bytes(changed)
    try:
        loaded = load(altered, make)
    except ConfigError:
        refused(altered)
        return
    sound = load(path, make)  # a bit of a note, a name of a plan's field, or padding: the numbers are the same
    assert all(torch.equal(a, b) for a, b in zip(matrices(loaded), matrices(sound), strict=True))


def test_one_flipped_bit_of_the_header_is_noticed(path):
    """In particular of a family's pattern, where another sound pattern is another matrix."""
    data = path.read_bytes()
    pattern = data.index(b"pattern")
    for at in range(pattern, data.index(b"}", pattern)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            altered = path.with_name("altered.safetensors")
            altered.write_bytes(changed)
            assert "damaged" in refused(altered)


def matrices(model):
    return [model[0].weight.to_dense(), model[0].bias, model[2].weight]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(shape=[24, 1 << 30]),
        lambda record: record.update(shape=[1 << 40, 1 << 40]),
        lambda record: record.update(shape=["24", 32]),
        lambda record: record.update(shape=[32, 24]),
        lambda record: record.update(splits=[1, 2]),
        lambda record: record.update(splits=[-3, 10**9]),
        lambda record: record.update(dense=True),
        lambda record: record.update(transposed="yes"),
        lambda record: record.update(plan=3),
        lambda record: record.update(plan=None),
        lambda record: record.update(code="import os"),
        lambda record: record.clear(),
    ],
)
def test_records_that_lie(path, change):
    header, said, data = parts(path)
    change(said["weights"]["0.weight"])
    write(path, header, said, data)
    assert "0.weight" in refused(path)


@pytest.mark.parametrize(
    "plan",
    [
        {"block_rows": -1, "block_cols": 16},
        {"block_rows": "16", "block_cols": 16},
        {"block_rows": 16, "block_cols": 16, "kernels": [[1, "rm -rf"]]},
        {"block_rows": 16, "block_cols": 16, "kernels": 5},
        {"block_rows": 16, "block_cols": 16, "kernels": [[[], "dense"]]},
        {"block_rows": 0, "block_cols": 0},
        {},
        {"__class__": "os.system"},
    ],
)
def test_plans_that_lie(path, plan):
    header, said, data = parts(path)
    said["plans"] = [plan]
    write(path, header, said, data)
    assert "0.weight" in refused(path)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("value", [0, 33, 255])
def test_intervals_out_of_range(path, row, value):
    header, said, data = parts(path)
    entry = header["0.weight_intervals"]
    num = entry["shape"][1]
    at = entry["data_offsets"][0] + row * num
    data = data[:at] + bytes([value]) + data[at + 1 :]
    if parts(path)[2][at] == value:
        pytest.skip("that is its value")
    in_range = row % 2 == 1 and value == 0  # another matrix: only the checksum can tell
    write(path, header, said, data, checksum=in_range)
    assert ("checksum" if in_range else "0.weight") in refused(path)


@pytest.mark.parametrize("dtype", ["I32", "F16", "U8"])
def test_dtypes_that_lie(path, dtype):
    header, said, data = parts(path)
    entry = header["0.weight_factors"]
    size = {"I32": 4, "F16": 2, "U8": 1}[dtype]
    begin, end = entry["data_offsets"]
    entry.update(dtype=dtype, shape=[(end - begin) // size])
    write(path, header, said, data)
    refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(rows=[1 << 50, 1 << 50]),
        lambda record: record.update(rows=[20, 0]),
        lambda record: record.update(cols=[24, 25]),
        lambda record: record.update(pattern=[[0], [99]]),
        lambda record: record.update(pattern=[[0, 0], [0]]),
        lambda record: record.update(family="os"),
        lambda record: record.update(family="gblr"),
        lambda record: record.update(family="monarch"),
        lambda record: record.update(extra=1),
        lambda record: record.clear(),
    ],
)
def test_families_that_lie(path, change):
    header, said, data = parts(path)
    change(said["families"]["2"])
    write(path, header, said, data)
    assert "'2'" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(version=3),
        lambda said: said.update(version=None),
        lambda said: said.update(format="other"),
        lambda said: said.update(weights=[]),
        lambda said: said.update(full=[3]),
        lambda said: said.update(tied={"a": "b"}),
        lambda said: said.update(tied={"0.bias": 3}),
        lambda said: said.update(unknown={}),
        lambda said: said.update(unknown=None),
        lambda said: said["weights"].update({"9.weight": {"shape": [2, 2], "plan": 0}}),
        lambda said: said.update(torchao={"0.bias": "{}"}),
    ],
)
def test_headers_that_lie(path, change):
    header, said, data = parts(path)
    change(said)
    write(path, header, said, data)
    refused(path)


def test_a_header_that_nests_without_end(path):
    header, _, data = parts(path)
    header["__metadata__"]["gblr"] = "[" * 100_000
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "damaged" in refused(path)


def test_plain_safetensors_are_not_ours(tmp_path):
    write_container(tmp_path / "plain.safetensors", entries_of({"a": torch.ones(2)}), {}, lambda _: torch.ones(2))
    assert "is not a gblr_plugin model file" in refused(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.pt", "c:x.safetensors", 5, None]
)
def test_an_index_that_leaves_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match=r"allowed are|damaged"):
        shard_paths(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match="damaged, or not an index"):
        shard_paths(tmp_path)


def test_converted_models_of_other_kinds_are_no_dense_state(path):
    with pytest.raises(ConfigError, match="holds no state dict of a dense network"):
        read_state(path, "weights")


def test_names_that_would_collide(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.a.register_buffer("weight_factors", torch.ones(1))

    model = Odd()
    prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    convert(model)
    model.a.register_buffer("weight_factors", torch.ones(1))
    with pytest.raises(ConfigError, match="two tensors of the model would be called"):
        save(model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(transposed=True),  # then the shape is the other way round
        lambda record: record.update(shape=[24, 32, 1], transposed=True),
        lambda record: record.update(shape=[24]),
        lambda record: record.update(shape=[24, True]),
        lambda record: record.update(splits=[]),
        lambda record: record.update(splits="1"),
        lambda record: record.update(splits=[1 << 62, 1 << 62]),
    ],
)
def test_records_of_a_network_that_agrees_with_them(path, change):
    header, said, data = parts(path)
    record = said["weights"]["0.weight"]
    change(record)
    write(path, header, said, data)
    with pytest.raises(ConfigError, match=r"'0\.weight'"):
        unflatten_weight(
            {**record, "plan": {"block_rows": 16, "block_cols": 16}},
            {name: tensor for name, tensor in load_file(path).items() if name.startswith("0.weight")},
            "0.weight",
        )
    assert "0.weight" in refused(path)


def weight_parts(components=3, **changed):
    """A record and tensors of an 8 x 6 weight that fit together, but for what is changed."""
    ends = torch.tensor([[4] * components, [2] * components, [3] * components, [0] * components], dtype=torch.uint8)
    tensors = {"w_factors": torch.ones(7 * components), "w_intervals": ends}
    record = {"shape": [8, 6], "plan": {"block_rows": 16, "block_cols": 16}}
    for name, value in changed.items():
        (tensors if name.startswith("w_") else record)[name] = value
    return record, tensors


def test_parts_that_fit_make_a_weight():
    weight = unflatten_weight(*weight_parts(), "w")
    assert weight.num_components == 3
    scaled = {"w_factors": torch.ones(21, dtype=torch.int8), "w_scales": torch.ones(3)}
    assert unflatten_weight(*weight_parts(**scaled), "w").scales is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"w_factors": torch.ones(3, 7)},
        {"w_factors": torch.ones(21, dtype=torch.int8)},  # no scales
        {"w_factors": torch.ones(21, dtype=torch.int64)},
        {"w_factors": torch.ones(20)},
        {"w_scales": torch.ones(3)},  # and factors that need none
        {"w_factors": torch.ones(21, dtype=torch.int8), "w_scales": torch.ones(4)},
        {"w_factors": torch.ones(21, dtype=torch.int8), "w_scales": torch.ones(3, dtype=torch.int32)},
        {"w_intervals": torch.ones(4, 3)},
        {"w_intervals": torch.ones(3, 4, dtype=torch.uint8)},
        {"w_intervals": torch.ones(12, dtype=torch.uint8)},
        {"w_intervals": torch.zeros(4, 0, dtype=torch.uint8)},
        # A component without rows costs nothing and has no place in a file.
        {"w_intervals": torch.tensor([[0, 4], [0, 0], [3, 3], [0, 0]], dtype=torch.uint8), "w_factors": torch.ones(10)},
        {"w_intervals": torch.full((4, 100_000), 1, dtype=torch.uint8), "w_factors": torch.ones(200_000)},
        {"dense": True},
        {"dense": True, "w_factors": torch.ones(48)},  # a plan of blocks
        {"plan": {"block_rows": 0, "block_cols": 0}, "dense": True, "w_factors": torch.ones(40)},
        {"plan": {"block_rows": 0, "block_cols": 0}},
        {"shape": [8, 3, 2], "plan": {"block_rows": 16, "block_cols": 15}},
    ],
)
def test_parts_that_do_not_fit_together(changed):
    with pytest.raises(ConfigError, match=r"^the record or the tensors of 'w' do not fit together$"):
        unflatten_weight(*weight_parts(**changed), "w")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["stacked"].clear(),
        lambda record: record["stacked"].pop(),
        lambda record: record["stacked"].append({"stacked": []}),
        lambda record: record["stacked"].append(record["stacked"][0]),
        lambda record: record.update(family="low_rank"),
        lambda record: record.update(stacked=3),
        lambda record: record.update(stacked=[None]),
    ],
)
def test_stacks_that_lie(tmp_path, change):
    model = nn.Sequential(trainable(families.get("monarch"), nn.Linear(32, 24), 0.5, row_splits=2))
    save(gblr.convert(model.eval()), tmp_path / "stack.safetensors")
    header, said, data = parts(tmp_path / "stack.safetensors")
    change(said["families"]["0"])
    write(tmp_path / "stack.safetensors", header, said, data)
    assert "'0'" in refused(tmp_path / "stack.safetensors", lambda: nn.Sequential(nn.Linear(32, 24)))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"kernel": [3, 3], "stride": [1, 1]}, None),
        ({"kernel": [3, 70_000], "stride": [1, 1]}, "sizes"),
        ({"kernel": [3, 3, 3], "stride": [1, 1]}, "sizes"),
        ({"kernel": [], "stride": []}, "sizes"),
        ({"kernel": [3, True], "stride": [1, 1]}, "sizes"),
    ],
)
def test_tucker_records(record, reason):
    matrix = families.get("tucker2").from_dense(torch.randn(8, 4 * 9), 0.6, kernel_size=(3, 3), stride=(1, 1))
    changed = {**family_record(matrix), "kernel_size": record["kernel"], "stride": record["stride"]}
    if reason is None:
        restored = restore_matrix(changed, matrix.factors(), matrix.shape)
        assert torch.equal(restored.to_dense(), matrix.to_dense())
        return
    with pytest.raises(ConfigError, match="do not fit together") as caught:
        restore_matrix(changed, matrix.factors(), matrix.shape)
    assert caught.value.__cause__ is not None


def test_factors_left_over():
    matrix = families.get("low_rank").from_dense(torch.randn(8, 6), 0.5)
    record, factors = family_record(matrix), matrix.factors()
    assert torch.equal(restore_matrix(record, factors, (8, 6)).to_dense(), matrix.to_dense())
    with pytest.raises(ConfigError, match="do not fit together"):
        restore_matrix(record, {**factors, "more": torch.ones(2)}, (8, 6))
    with pytest.raises(ConfigError, match="do not fit together"):
        restore_matrix(record, factors, (8, 7))


def test_dtypes_without_a_place_in_such_files(tmp_path):
    value = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ConfigError, match=r"save: 'a' has dtype torch.complex128, which safetensors files do not hold"):
        write_container(tmp_path / "t.safetensors", entries_of({"a": value}), {}, lambda _: value)
    assert os.listdir(tmp_path) == []


def test_a_tensor_other_than_announced_is_not_written(tmp_path):
    announced = entries_of({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="announced were"):
        write_container(tmp_path / "t.safetensors", announced, {}, lambda _: torch.ones(3))
    assert os.listdir(tmp_path) == []


def test_an_index_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("gblr_plugin.serialization.container._MAX_INDEX_BYTES", 50)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match="damaged, or not an index"):
        shard_paths(tmp_path)


@pytest.mark.parametrize("change", [{"kernel_size": [9, 1]}, {"kernel_size": [5, 5]}, {"stride": [2, 2]}])
def test_a_matrix_of_another_convolution(tmp_path, change):
    def network():
        return nn.Sequential(nn.Conv2d(8, 16, 3))

    model = network()
    gblr.prepare(model, ["0"], family="tucker2", budget=0.5)
    save(gblr.convert(model.eval()), tmp_path / "conv.safetensors")
    assert load(tmp_path / "conv.safetensors", network) is not None
    header, said, data = parts(tmp_path / "conv.safetensors")
    said["families"]["0"].update(change)
    write(tmp_path / "conv.safetensors", header, said, data)
    assert "'0'" in refused(tmp_path / "conv.safetensors", network)
