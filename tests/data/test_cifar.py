"""CIFAR's files as they are published, small: pickles of Python 2 and 3, records, and archives of both."""

import io
import os
import pickle
import struct
import tarfile

import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.data.cifar import load_cifar, read_pickle

np = pytest.importorskip("numpy")


class Python2Pickler(pickle._Pickler):
    """Writes bytes as the strings of Python 2, as the published files hold them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python3(value):
    return pickle.dumps(value, 2)


def batch(start, count=4, classes=10):
    pixels = (np.arange(count * 3072) + start).reshape(count, 3072).astype(np.uint8)
    labels = [(start + i) % classes for i in range(count)]
    return pixels, labels


def cifar10(folder, dump):
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = batch(index)
        values = {b"batch_label": b"some", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * len(labels)}
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(dump(values))


def cifar10_records(folder):
    for index, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        pixels, labels = batch(index)
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"".join(bytes([n]) + row.tobytes() for n, row in zip(labels, pixels, strict=True)))


def packed(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def check(place):
    (train, target), (test, test_target) = load_cifar(str(place), 10)
    assert (train.shape, train.dtype, target.dtype) == ((20, 3, 32, 32), torch.uint8, torch.int64)
    pixels, labels = batch(2)
    assert torch.equal(train[8:12].flatten(1), torch.from_numpy(pixels))
    assert target[8:12].tolist() == labels
    assert torch.equal(test.flatten(1), torch.from_numpy(batch(5)[0]))
    assert test_target.tolist() == batch(5)[1]


@pytest.mark.parametrize("dump", [python2, python3])
def test_pickles_unpacked_named_and_packed(tmp_path, dump):
    folder = tmp_path / "cifar-10-batches-py"
    cifar10(folder, dump)
    check(tmp_path)
    check(folder)
    packed(folder, tmp_path / "cifar-10-python.tar.gz")
    check(tmp_path)


def test_records_unpacked_and_packed(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    cifar10_records(folder)
    check(tmp_path)
    packed(folder, tmp_path / "cifar-10-binary.tar.gz")
    check(tmp_path)


def test_cifar_100_has_fine_labels_in_both_forms(tmp_path):
    (tmp_path / "py" / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "bin" / "cifar-100-binary").mkdir(parents=True)
    for name in ("train", "test"):
        pixels, fine = batch(90, 4, 100)
        values = {b"fine_labels": fine, b"coarse_labels": [7] * 4, b"data": pixels}
        (tmp_path / "py" / "cifar-100-python" / name).write_bytes(python2(values))
        records = b"".join(bytes([7, n]) + row.tobytes() for n, row in zip(fine, pixels, strict=True))
        (tmp_path / "bin" / "cifar-100-binary" / f"{name}.bin").write_bytes(records)
    for place in ("py", "bin"):
        for images, target in load_cifar(str(tmp_path / place), 100):
            assert torch.equal(images.flatten(1), torch.from_numpy(pixels))
            assert target.tolist() == [90, 91, 92, 93]


class Runs:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_no_code_of_a_pickle_is_run(tmp_path):
    place = tmp_path / "made"
    for value in (Runs(str(place)), {b"data": Runs(str(place))}):
        with pytest.raises(ConfigError, match=r"a\.bin is refused: it holds the name \w+\.mkdir"):
            read_pickle(pickle.dumps(value, 2), "a.bin")
    assert not place.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({b"data": np.zeros((2, 2))}, "dtype"),
        ({b"data": np.zeros((2, 2), dtype=object)}, "dtype"),
        ({b"data": np.zeros((2, 2, 2), dtype=np.uint8)}, "shape, dtype and bytes do not fit"),
        ({b"data": np.asfortranarray(np.zeros((2, 2), dtype=np.uint8))}, "column order"),
        ({b"data": np.float64(1.0)}, r"refused: it holds"),
        ({b"data": bytearray(b"ab")}, r"the name \w+\.bytearray"),
        ([1, 2], "is not a dictionary"),
    ],
)
def test_anything_but_bytes_in_rows_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        read_pickle(pickle.dumps(value, 2), "a.bin")


def test_an_array_that_claims_more_than_its_bytes():
    content = pickle.dumps({b"data": np.zeros((2, 5), dtype=np.uint8)}, 2)
    with pytest.raises(ConfigError, match="do not fit"):
        read_pickle(content.replace(b"K\x02K\x05\x86", b"K\x02K\x09\x86"), "a.bin")


@pytest.mark.parametrize("cut", [0, 1, 40, 300])
def test_a_damaged_pickle_is_named(cut):
    with pytest.raises(ConfigError, match=r"a\.bin is"):
        read_pickle(python2({b"data": batch(0)[0]})[:cut], "a.bin")


def test_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no CIFAR-10 in .* looked for cifar-10-batches-py/, .*cifar-10-python\.tar\.gz"
    ):
        load_cifar(str(tmp_path), 10)
    folder = tmp_path / "cifar-10-batches-bin"
    cifar10_records(folder)
    first = folder / "data_batch_1.bin"
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"data_batch_1\.bin' is no whole number of records of 3073 bytes"):
        load_cifar(str(tmp_path), 10)
    first.write_bytes(b"\x0b" + content[1:])
    with pytest.raises(ConfigError, match=r"a label is not in 0 \.\. 9"):
        load_cifar(str(tmp_path), 10)
    first.write_bytes(content)
    packed(folder, archive := tmp_path / "cifar-10-binary.tar.gz")
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(ConfigError, match="is damaged"):
        load_cifar(str(tmp_path), 10)


class Text:
    """Pickled as the call that Python 3 makes for bytes, with arguments of one's choice."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        import codecs

        return codecs.encode, self.arguments


@pytest.mark.parametrize("arguments", [("a", "utf8"), (5, "latin1"), ("a", "rot13")])
def test_text_that_stands_for_no_bytes(arguments):
    with pytest.raises(ConfigError, match=r"refused: it holds"):
        read_pickle(pickle.dumps({b"data": Text(*arguments)}, 2), "a file")
    assert read_pickle(pickle.dumps({b"data": Text("a", "latin1")}, 2), "a file") == {b"data": b"a"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop(b"data"), "has no data and labels"),
        (lambda values: values.update({b"data": b"x"}), "has no data and labels"),
        (lambda values: values.update({b"labels": 3}), "has no data and labels"),
        (lambda values: values.update({b"labels": ["a"] * 4}), "has no data and labels"),
        (lambda values: values.update({b"labels": [1, 2]}), "are not CIFAR's"),
        (lambda values: values.update({b"labels": [1, 2, 3, 10]}), "not in 0"),
        (lambda values: values.update({b"labels": [1, 2, 3, -1]}), "not in 0"),
        (lambda values: values.update({b"data": values[b"data"][:, :5]}), "are not CIFAR's"),
    ],
)
def test_batches_that_hold_something_else(tmp_path, change, says):
    cifar10(tmp_path / "cifar-10-batches-py", python3)
    pixels, labels = batch(0)
    values = {b"labels": labels, b"data": pixels}
    change(values)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(python3(values))
    with pytest.raises(ConfigError, match=says) as caught:
        load_cifar(str(tmp_path), 10)
    assert "data_batch_3" in str(caught.value)


def test_files_of_any_size_are_not_read(tmp_path, monkeypatch):
    cifar10(tmp_path / "cifar-10-batches-py", python3)
    monkeypatch.setattr("gblr_plugin.data.cifar._MOST_BYTES", 100)
    with pytest.raises(ConfigError, match="more than any file of CIFAR"):
        load_cifar(str(tmp_path), 10)
