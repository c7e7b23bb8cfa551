"""The ``gblr`` command. Exit codes: 0 done, 2 bad config or arguments (one line), 1 anything else."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from . import __version__
from .commands import compare, eval, export, inspect, plan, report, run, search
from .compression import command as compress
from .errors import ConfigError, GBLRError
from .utils.arguments import OneLineParser

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="gblr", description="Learned structured matrices: compress networks that really run faster."
    )
    parser.add_argument("--version", action="version", version=f"gblr-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser, metavar="COMMAND")
    for command in (plan, compress, run, compare, search, report, inspect, eval, export):
        command.add_parser(commands)
    # Its own parser, which imports torch, reads the rest.
    commands.add_parser("bench", help="time structured against dense layers", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            from .bench.command import make_parser

            arguments = make_parser().parse_args(argv[1:])
        else:
            arguments = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return _guarded(lambda: arguments.call(arguments), arguments.debug)


def _guarded(command: Callable[[], int | None], debug: bool) -> int:
    """The exit code of a command; its error in one line on standard error, after its traceback if that is wanted."""
    try:
        code = int(command() or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail(1, "interrupted")
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, GBLRError):
            return _fail(2 if isinstance(error, ConfigError) else 1, str(error))
        details = "" if debug else f" (details in {_saved_traceback()})"
        return _fail(1, f"{type(error).__name__}: {error}{details}")
    return code


def _saved_traceback() -> str:
    """A new file with the traceback of the error that is being handled, among the system's temporary files."""
    try:
        handle, path = tempfile.mkstemp(prefix="gblr-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"gblr-plugin {__version__}, Python {sys.version.split()[0]}\n\n{traceback.format_exc()}")
    except OSError:
        return "no file: none could be written"
    return path


def _fail(code: int, message: str) -> int:
    print(f"gblr: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
