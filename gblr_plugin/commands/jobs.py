"""Jobs that write a folder: what ``gblr run``, ``compare`` and ``search`` have in common."""

from __future__ import annotations

import argparse
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, GBLRError, first_line
from ..utils.console import CapturedOutput, Console, captured_output

__all__ = ["Job", "carry_out", "output_of"]


class _Result(Protocol):
    def to_json(self) -> str: ...


class Job(Protocol):
    """A job whose settings were checked.

    Attributes:
        LEFT: Names in the output by which it would go on with what an interrupted job has done.
    """

    LEFT: tuple[str, ...]

    def forecast(self) -> str:
        """What it would do, in lines for a terminal."""

    def run(self, output: Path, console: Console) -> _Result:
        """Do it; results go to an existing folder."""


def output_of(arguments: argparse.Namespace) -> Path:
    """The folder that is given, or one in ``outputs/`` with the name of the config."""
    output: Path | None = arguments.output
    return output or Path("outputs", arguments.config.stem)


def carry_out(
    arguments: argparse.Namespace, prepare: Callable[[], Any], output: Path, hint: Callable[[Path], str] | None = None
) -> None:
    """Prepare a job and run it into a folder; the terminal shows our lines alone.

    Args:
        arguments: With the common flags.
        prepare: Makes a :class:`Job`; all that can be refused is refused there, before anything is written.
        output: The folder.
        hint: What else to say after the result, of the folder.

    Raises:
        ConfigError: If something cannot be used.
        GBLRError: If the job fails.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {str(output)!r} is a file, need a folder")
    with captured_output(arguments.verbose) as captured:  # importing the hosts is noisy, and so are they
        console = Console(captured.errors if arguments.json else captured.terminal, arguments.quiet)
        job = prepare()
        if arguments.dry_run:
            console.result(f"{job.forecast()}\nwould write to {output}; nothing was written")
            return
        _open(output, captured, job.LEFT if arguments.fresh else ())
        result = _run(job, output, console)
        if arguments.json:
            Console(captured.terminal).result(result.to_json())
        else:
            console.result(f"\n{result}\n")
            console.line(f"everything is in {output}{f'; {hint(output)}' if hint else ''}")


def _open(output: Path, captured: CapturedOutput, left: tuple[str, ...]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        captured.send_to(output / "run.log")
        for name in left:
            path = output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {str(output)!r}: {error.strerror}") from error


def _run(job: Any, output: Path, console: Console) -> Any:
    try:
        return job.run(output, console)
    except ConfigError:
        raise
    except Exception as error:
        traceback.print_exc()
        name, reason = type(error).__name__, first_line(error)
        shown = name if reason == name else f"{name}: {reason}"
        raise GBLRError(f"the run failed: {shown} (details in {output / 'run.log'})") from error
