"""Files of data as a user has them: texts by line, running text, JSON lines, folders of images."""

from __future__ import annotations

import json
from pathlib import Path

from ..data.images import image_files
from ..errors import ConfigError

__all__ = ["find_images", "read_running_text", "read_texts"]

_TEXT = "text"  # the field of a JSON line that is read


def read_texts(path: Path, who: str) -> list[str]:
    """The texts of a file: its lines that are not blank, or the field ``"text"`` of each object of a JSON-lines file.

    Args:
        path: UTF-8 text; by its suffix ``.jsonl`` or ``.ndjson`` one JSON object a line, of which other fields are
            passed over.
        who: The option that names the file, for messages.

    Returns:
        Texts without the white space around them.

    Raises:
        ConfigError: If there is no such file, it is no text, or it holds none.
    """
    content = _content(path, who)
    texts = _json_lines(content, path, who) if _is_json_lines(path) else content.split("\n")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"{who}: {str(path)!r} holds no text")
    return texts


def read_running_text(path: Path, who: str) -> str:
    """A file as one text; of a JSON-lines file the texts, with a blank line between them.

    Args:
        path: As :func:`read_texts` takes it.
        who: The same.

    Raises:
        ConfigError: As there.
    """
    content = _content(path, who)
    text = "\n\n".join(_json_lines(content, path, who)) if _is_json_lines(path) else content
    if not text.strip():
        raise ConfigError(f"{who}: {str(path)!r} holds no text")
    return text


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _content(path: Path, who: str) -> str:
    if path.is_dir():
        raise ConfigError(f"{who}: {str(path)!r} is a folder; this model reads text, need a text or JSON-lines file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{who}: no file at {str(path)!r}") from error
    except OSError as error:
        raise ConfigError(f"{who}: cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{who}: {str(path)!r} is not UTF-8 text (byte {error.start})") from error
    if "\0" in content:
        raise ConfigError(f"{who}: {str(path)!r} is not text: it holds zero bytes")
    return content


def _json_lines(content: str, path: Path, who: str) -> list[str]:
    numbered = enumerate(content.split("\n"), 1)
    return [_field(line, f"{str(path)!r} line {number}", who) for number, line in numbered if line.strip()]


def _field(line: str, place: str, who: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{who}: {place} is no JSON: {error}") from error
    text = value.get(_TEXT) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{who}: {place}: need an object with a string as "{_TEXT}"')
    return text


def find_images(path: Path, who: str) -> list[Path]:
    """The images of a folder and of the folders in it.

    Args:
        path: The folder.
        who: The option that names it, for messages.

    Raises:
        ConfigError: If there is no such folder, or no image in it.
    """
    if path.is_file():
        raise ConfigError(f"{who}: {str(path)!r} is a file; this model reads images, need a folder of them")
    if not path.is_dir():
        raise ConfigError(f"{who}: no folder at {str(path)!r}")
    files = [Path(file) for file in image_files(path)]
    if not files:
        raise ConfigError(f"{who}: no image in {str(path)!r}")
    return files
