"""CIFAR-10 and CIFAR-100 from their published files: python pickles or binary records, unpacked or as the archive."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .places import existing_folder, missing

__all__ = ["load_cifar", "read_pickle"]

_PIXELS = 3 * 32 * 32
_MOST_BYTES = 400_000_000  # the largest real file has 154 MB

# Per number of classes: folder and files as pickles, folder and files as binary records, bytes of labels per record.
_LAYOUT: dict[int, tuple[str, list[str], list[str], str, list[str], list[str], int]] = {
    10: (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        ["test_batch"],
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        1,
    ),
    100: ("cifar-100-python", ["train"], ["test"], "cifar-100-binary", ["train.bin"], ["test.bin"], 2),
}


class _Dtype:
    """Stands for numpy.dtype in a pickle; only bytes are let through."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, need uint8")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


class _Array:
    """Stands for numpy.ndarray in a pickle: keeps the shape and the raw bytes."""

    shape: tuple[int, ...] = ()
    data: bytes = b""

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, fortran, data = state
            data = data.encode("latin1") if isinstance(data, str) else data
            valid = isinstance(dtype, _Dtype) and isinstance(data, bytes) and len(shape) == 2
            valid = valid and all(type(n) is int and n >= 0 for n in shape) and shape[0] * shape[1] == len(data)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise pickle.UnpicklingError("an array whose shape, dtype and bytes do not fit")
        if fortran and 1 not in shape:
            raise pickle.UnpicklingError("an array in column order")
        self.shape, self.data = tuple(shape), data


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("text that is not bytes written as latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes into a pickle that Python 2 reads
}


class _Unpickler(pickle.Unpickler):
    """Refuses every name but those of a byte array, which are replaced by stand-ins: no code of a file is ever run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent reference")


def read_pickle(content: bytes, source: str) -> dict[bytes, Any]:
    """Read a pickled dictionary of plain values and arrays of bytes, and nothing else.

    Args:
        content: The pickle.
        source: Its place, for messages.

    Returns:
        Values by name. An array is a (rows, columns) uint8 tensor.

    Raises:
        ConfigError: If it holds anything else, or is damaged.
    """
    try:
        values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ConfigError(f"data: {source} is refused: it holds {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ConfigError(f"data: {source} is damaged: {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"data: {source} is not a dictionary")

    def plain(value: Any) -> Any:
        if isinstance(value, _Array):
            return torch.frombuffer(bytearray(value.data) or bytearray(1), dtype=torch.uint8)[
                : value.shape[0] * value.shape[1]
            ].reshape(value.shape)
        return value

    return {key.encode() if isinstance(key, str) else key: plain(value) for key, value in values.items()}


def _from_pickle(content: bytes, source: str, classes: int) -> tuple[Tensor, Tensor]:
    values = read_pickle(content, source)
    data, labels = values.get(b"data"), values.get(b"fine_labels" if classes == 100 else b"labels")
    if not isinstance(data, Tensor) or not isinstance(labels, list) or not all(type(n) is int for n in labels):
        raise ConfigError(f"data: {source} has no data and labels of CIFAR-{classes}")
    return data, torch.tensor(labels, dtype=torch.int64)


def _from_records(content: bytes, source: str, label_bytes: int) -> tuple[Tensor, Tensor]:
    if not content or len(content) % (label_bytes + _PIXELS):
        raise ConfigError(f"data: {source} is no whole number of records of {label_bytes + _PIXELS} bytes")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, label_bytes + _PIXELS)
    return records[:, label_bytes:], records[:, label_bytes - 1].long()  # the fine label stands last


def _checked(data: Tensor, target: Tensor, source: str, classes: int) -> tuple[Tensor, Tensor]:
    if data.ndim != 2 or data.shape[1] != _PIXELS or len(data) != len(target) or not len(target):
        raise ConfigError(f"data: {source}: {tuple(data.shape)} pixels and {len(target)} labels are not CIFAR's")
    if not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ConfigError(f"data: {source}: a label is not in 0 .. {classes - 1}")
    return data.reshape(-1, 3, 32, 32), target


def _contents(root: Path, folder: str, archive: str, names: list[str]) -> dict[str, bytes] | None:
    """Bytes by place, from unpacked files or out of the archive, which is not unpacked; ``None`` where neither is."""
    for place in (root / folder, root):
        files = [place / name for name in names]
        if all(file.is_file() for file in files):
            return {repr(str(file)): _limited(file.stat().st_size, file, file.read_bytes) for file in files}
    packed = root / archive
    if not packed.is_file():
        return None
    try:
        with tarfile.open(packed, "r:gz") as tar:
            found = {}
            for name in names:
                member = tar.getmember(f"{folder}/{name}")
                file: Any = tar.extractfile(member)  # None for a folder or a device
                found[f"{name!r} in {str(packed)!r}"] = _limited(member.size, packed, file.read)
            return found
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"data: {str(packed)!r} is not CIFAR's archive: {error}") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"data: {str(packed)!r} is damaged: {error}") from error


def _limited(size: int, source: Path, read: Callable[[], bytes]) -> bytes:
    if size > _MOST_BYTES:
        raise ConfigError(f"data: {str(source)!r} holds {size} bytes, more than any file of CIFAR")
    return read()


def load_cifar(folder: object, classes: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images of CIFAR.

    Args:
        folder: Where the unpacked folder or the ``.tar.gz`` lies, or the unpacked folder itself. The python and the
            binary version are both read.
        classes: 10, or 100 for CIFAR-100 with its fine labels.

    Returns:
        ((N, 3, 32, 32) uint8 images, (N,) int64 labels) of the training set and of the test set.

    Raises:
        ConfigError: If nothing is there, or a file is damaged or holds something else.
    """
    python, train, test, binary, train_bin, test_bin, label_bytes = _LAYOUT[classes]
    archives = f"cifar-{classes}-python.tar.gz", f"cifar-{classes}-binary.tar.gz"
    what, looked_for = f"CIFAR-{classes}", f"{python}/, {binary}/, {archives[0]} and {archives[1]}"
    how = f"https://www.cs.toronto.edu/~kriz/{archives[0]}"
    root = existing_folder(folder, what, looked_for, how)

    def load(names: list[str], binary_names: list[str]) -> tuple[Tensor, Tensor]:
        found = []
        if (pickles := _contents(root, python, archives[0], names)) is not None:
            found = [(*_from_pickle(content, source, classes), source) for source, content in pickles.items()]
        elif (records := _contents(root, binary, archives[1], binary_names)) is not None:
            found = [(*_from_records(content, source, label_bytes), source) for source, content in records.items()]
        else:
            raise missing(what, looked_for, root, how)
        checked = [_checked(data, target, source, classes) for data, target, source in found]
        return torch.cat([data for data, _ in checked]), torch.cat([target for _, target in checked])

    return load(train, train_bin), load(test, test_bin)
