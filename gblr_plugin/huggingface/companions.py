"""What lies beside the weights in the folder of a model, and goes with them when these are compressed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..utils.files import replacing

__all__ = ["copy_companions"]

_COPIED = (".json", ".txt", ".model", ".jinja")
_NOTICES = ("license", "licence", "notice")


def copy_companions(source: Path, output: Path) -> None:
    """Copy what lies beside the weights of a folder: tokenizer, processor, licence, modules of sentence transformers.

    ``config.json``, the index of shards and the model card (``README.md``) are not copied, since the output has its
    own.

    Raises:
        OSError: If a file cannot be read or written.
    """
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        notice = file.name.lower().startswith(_NOTICES)
        if (file.suffix in _COPIED or notice) and file.name != "config.json" and not file.name.endswith(".index.json"):
            _copy(file, output / file.name)
    for folder in _modules(source):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            _copy(file, output / file.relative_to(source))
        (output / folder.relative_to(source)).mkdir(parents=True, exist_ok=True)


def _copy(file: Path, target: Path) -> None:
    with file.open("rb") as read, replacing(target) as written:
        shutil.copyfileobj(read, written)


def _modules(source: Path) -> list[Path]:
    """The folders, inside a sentence transformer's, that its ``modules.json`` names."""
    try:
        named = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        folders = [source / module["path"] for module in named if module["path"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    inside = [folder for folder in folders if folder.is_dir() and folder.resolve() != source.resolve()]
    return [folder for folder in inside if folder.resolve().is_relative_to(source.resolve())]
