"""What the commands of ``gblr`` share: parsers whose errors take one line, and flags that mean the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["OneLineParser", "add_command", "common_flags", "positive"]

_FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "set": (
        ("--set",),
        {
            "action": "append",
            "default": [],
            "metavar": "KEY.SUB=VALUE",
            "help": "change one key of a config; repeatable",
        },
    ),
    "dry_run": (
        ("--dry-run",),
        {"action": "store_true", "help": "check everything and say what would be done; write nothing"},
    ),
    "fresh": (("--fresh",), {"action": "store_true", "help": "begin anew, where an interrupted command would go on"}),
    "json": (
        ("--json",),
        {"action": "store_true", "help": "print the result as JSON, all else on standard error"},
    ),
    "verbose": (
        ("-v", "--verbose"),
        {"action": "store_true", "help": "show what the hosts say, on standard error"},
    ),
    "quiet": (("-q", "--quiet"), {"action": "store_true", "help": "print the result alone, no progress"}),
    "debug": (("--debug",), {"action": "store_true", "help": "show the traceback of an error"}),
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse prints its usage over several lines
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def common_flags(*names: str, output: str | None = None, required: bool = False) -> OneLineParser:
    """A parent parser with flags that mean the same in every command; ``--debug`` is always among them.

    Args:
        names: Of ``"set"``, ``"dry_run"``, ``"fresh"``, ``"json"``, ``"verbose"``, ``"quiet"``.
        output: Adds ``--output PATH``, with this help.
        required: Whether ``--output`` must be given.
    """
    parser = OneLineParser(add_help=False)
    if output is not None:
        parser.add_argument("--output", type=Path, metavar="PATH", required=required, help=output)
    shared = parser.add_argument_group("common flags")
    for name in (*names, "debug"):
        words, how = _FLAGS[name]
        shared.add_argument(*words, **how)
    return parser


def add_command(
    commands: Any,
    name: str,
    what: str,
    call: Callable[[argparse.Namespace], int | None],
    *,
    flags: OneLineParser,
    examples: Iterable[str] = (),
) -> OneLineParser:
    """Add a command.

    Args:
        commands: From ``add_subparsers``.
        name: As users type it.
        what: What it does, as a phrase.
        call: Is given the parsed arguments.
        flags: From :func:`common_flags`.
        examples: Integer commands that its help shows.
    """
    shown = "".join(f"\n  {example}" for example in examples)
    parser: OneLineParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        parents=[flags],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:{shown}" if shown else None,
    )
    parser.set_defaults(call=call)
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, as the ``type`` of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
