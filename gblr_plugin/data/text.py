"""Text as tokens: encoded once into a file that is memory-mapped afterwards, and read in windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError
from ..utils.files import write_atomic
from ..utils.progress import track
from .places import existing_folder, missing

__all__ = ["STRETCH", "TokenFile", "Windows", "encode", "labelled_lines", "text_parts"]

STRETCH = 64
"""Neighbouring windows or lines that go to the same part when a text is divided: windows overlap."""

_LINES = 4096  # encoded together
_WIKITEXT = {"train": "wiki.train.raw", "held_out": "wiki.valid.raw", "test": "wiki.test.raw"}
_GET_WIKITEXT = (
    "wikitext-103-raw-v1.zip, or the data set Salesforce/wikitext of the Hugging Face hub written out as these files"
)
_GET_TEXT = "put your UTF-8 text into train.txt and val.txt, or into *.txt files of train/ and val/"


class TokenFile:
    """Tokens on disk, mapped into memory; may be sent to other processes, which map the same file.

    Args:
        path: A one-dimensional ``.npy`` file of uint16 or uint32, as :func:`encode` writes it.

    Raises:
        ConfigError: If it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = self._mapped()

    def _mapped(self) -> Any:
        try:
            tokens = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data: {str(self.path)!r} is no file of tokens: {error}") from error
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise ConfigError(f"data: {str(self.path)!r} is no file of tokens: {tokens.dtype} {tokens.shape}")
        return tokens

    def numel(self) -> int:
        """Number of tokens."""
        return len(self._map)

    def __getitem__(self, indices: slice) -> Tensor:
        """The tokens of a slice as int64."""
        return torch.from_numpy(self._map[indices].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._map = self._mapped()


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a sequence of tokens, and the same windows one token later.

    Args:
        tokens: (N,) integers in memory, or a file of them.
        context: Length of a window.
        stride: Distance between window starts.
    """

    def __init__(self, tokens: Tensor | TokenFile, context: int, stride: int) -> None:
        self.tokens, self.context, self.stride = tokens, context, stride

    def __len__(self) -> int:
        return max((self.tokens.numel() - self.context - 1) // self.stride + 1, 0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(context,) int64 tokens and (context,) int64 targets."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.stride
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def text_parts(folder: object, *, wikitext: bool) -> tuple[list[Path], list[Path]]:
    """Files of the training and of the held-out text.

    Args:
        folder: Path of the data set. WikiText-103 is ``wiki.train.raw`` and ``wiki.valid.raw``; own text is
            ``train.txt`` and ``val.txt``, or folders of these names with ``*.txt`` files.
        wikitext: Whether it must be WikiText-103.

    Raises:
        ConfigError: If it is not there.
    """
    what, how = ("WikiText-103", _GET_WIKITEXT) if wikitext else ("text", _GET_TEXT)
    looked_for = (
        f"{_WIKITEXT['train']} and {_WIKITEXT['held_out']}" if wikitext else "train.txt and val.txt, or train/ and val/"
    )
    root = existing_folder(folder, what, looked_for, how)
    if wikitext:
        listed = [[root / _WIKITEXT["train"]], [root / _WIKITEXT["held_out"]]]
    else:
        listed = [[root / f"{name}.txt", *sorted((root / name).rglob("*.txt"))] for name in ("train", "val")]
    train, held_out = ([file for file in files if file.is_file()] for files in listed)
    if not train or not held_out:
        raise missing(what, looked_for, root, how)
    return train, held_out


def _chunks(files: list[Path]) -> Iterator[list[str]]:
    for file in files:
        lines: list[str] = []
        try:
            with file.open(encoding="utf-8", newline="\n") as text:
                for line in text:
                    lines.append(line)
                    if len(lines) == _LINES:
                        yield lines
                        lines = []
        except UnicodeDecodeError as error:
            raise ConfigError(f"data: {str(file)!r} is not text in UTF-8") from error
        if lines:
            yield lines


def _fingerprint(files: list[Path], tokenizer: Any) -> str:
    """Changes with the tokenizer and with each file's path, size and time."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = json.dumps([stats, tokenizer.backend_tokenizer.to_str()])
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def encode(files: list[Path], tokenizer: Any, cache: Path) -> TokenFile:
    """Tokens of text files, one after another, encoded at the first call and read from the cache at the next.

    Args:
        files: UTF-8 text, encoded line by line, so that only some lines are in memory at a time.
        tokenizer: A fast tokenizer of ``transformers``; no special tokens are added.
        cache: Folder of the token file. It is written whole or not at all; its name changes with text and tokenizer.

    Raises:
        ConfigError: If a file is not UTF-8, there is no token, or the cache cannot be written.
    """
    path = cache / f"tokens-{_fingerprint(files, tokenizer)}.npy"
    if not path.is_file():
        kind = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        try:
            write_atomic(path, partial(_write_tokens, files=files, tokenizer=tokenizer, kind=kind))
        except OSError as error:
            raise ConfigError(
                f"data: cannot write tokens to {str(cache)!r}: {error.strerror}; set model.cache"
            ) from error
    return TokenFile(path)


def _write_tokens(file: BinaryIO, files: list[Path], tokenizer: Any, kind: np.dtype[Any]) -> None:
    """A .npy file whose length is known at the end: its header is written twice, at the same length."""

    def header(count: int) -> int:
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": kind.str, "fortran_order": False, "shape": (count,)})
        return file.tell()

    begin, count = header(0), 0
    for place in track([str(file) for file in files], "encoding"):
        for lines in _chunks([Path(place)]):
            for ids in tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False):
                file.write(np.asarray(ids.ids, dtype=kind).tobytes())
                count += len(ids.ids)
    if not count:
        raise ConfigError(f"data: there is no text in {str(files[0])!r}")
    if header(count) != begin:
        raise RuntimeError("the header of a token file changed its length")


def labelled_lines(folder: object) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(text, label) pairs of train.tsv and dev.tsv, as in GLUE's SST-2: a header with ``sentence`` and ``label``.

    Raises:
        ConfigError: If a file is missing, or has no such columns.
    """
    how = "SST-2.zip of https://gluebenchmark.com/tasks, or write your own: a header, then text, tab, label"
    root = existing_folder(folder, "labelled text", "train.tsv and dev.tsv", how)
    train, held_out = root / "train.tsv", root / "dev.tsv"
    if not train.is_file() or not held_out.is_file():
        raise missing("labelled text", "train.tsv and dev.tsv", root, how)
    return _table(train), _table(held_out)


def _table(path: Path) -> list[tuple[str, str]]:
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {str(path)!r} is not text in UTF-8") from error
    columns = header.split("\t")
    if not {"sentence", "label"} <= set(columns):
        raise ConfigError(f"data: {str(path)!r} needs the columns sentence and label, its first line is {header!r}")
    text, label = columns.index("sentence"), columns.index("label")
    pairs = []
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise ConfigError(f"data: {str(path)!r}:{number}: {len(cells)} columns, the header has {len(columns)}")
        pairs.append((cells[text], cells[label]))
    if not pairs:
        raise ConfigError(f"data: {str(path)!r} has a header and no line")
    return pairs
