"""A folder inside an output that holds unfinished work, so that an interrupted command can go on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .files import write_text

__all__ = ["WORK", "begin_work", "end_work"]

WORK = ".gblr"
"""Name of the folder of unfinished work inside an output."""

_NOTE = "task.json"


def begin_work(output: Path, task: Any, who: str) -> Path:
    """Note what is being done, or see that it is what was begun; remove what a killed process left half written.

    While the folder of work is there, the output is unfinished; :func:`end_work` removes it.

    Args:
        output: The output folder; made if needed.
        task: What is being done, as JSON values: everything that the result depends on.
        who: The command, for messages.

    Returns:
        The folder of work.

    Raises:
        ConfigError: If the output holds something else, or work on another task.
        OSError: If the output cannot be written to.
    """
    work, task = output / WORK, json.loads(json.dumps(task))
    note = work / _NOTE
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{who}: output {str(output)!r} is a file; give a new folder")
    if note.exists():
        try:
            same = json.loads(note.read_text(encoding="utf-8")) == task
        except ValueError:
            same = False
        if not same:
            raise ConfigError(
                f"{who}: {str(output)!r} holds unfinished work on another source or with other settings; give these "
                "again, or another output"
            )
    elif output.exists() and any(path.name != WORK for path in output.iterdir()):
        raise ConfigError(f"{who}: {str(output)!r} is not empty; give a new folder")
    for folder in (output, work):
        for left in folder.glob(".*.*.*") if folder.exists() else ():
            if left.is_file():
                left.unlink()
    write_text(note, json.dumps(task))
    return work


def end_work(work: Path) -> None:
    """Remove the folder of work of an output that is complete; the note, which came first, goes last.

    Raises:
        OSError: If something in it cannot be removed.
    """
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _NOTE:
            path.unlink()
    shutil.rmtree(work)
