"""Configs of commands: a YAML file and ``--set``, read into settings; ``--help-config`` says what they may hold."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..run.yaml_config import Located

__all__ = ["add_config", "locate", "read"]

S = TypeVar("S")


class _HelpConfig(argparse.Action):
    """Prints the JSON schema of a config, and ends."""

    def __init__(self, *args: Any, kind: Callable[[], type], **kwargs: Any) -> None:
        kwargs["nargs"] = 0
        super().__init__(*args, **kwargs)
        self._kind = kind

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ..run.json_schema import json_schema

        print(json.dumps(json_schema(self._kind()), indent=2))
        parser.exit()


def add_config(parser: argparse.ArgumentParser, kind: Callable[[], type]) -> None:
    """Add the argument CONFIG.yaml, and the flag that prints what such a file may hold.

    Args:
        parser: Of the command.
        kind: Gives the dataclass of the settings; called where the flag is used, since imports take time.
    """
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--help-config", action=_HelpConfig, kind=kind, help="print the JSON schema of the config")


def locate(config: str | Path, overrides: list[str]) -> Located:
    """A parsed file with its overrides.

    Raises:
        ConfigError: If it cannot be used.
    """
    from ..run.yaml_config import load_yaml, parse_overrides

    located = load_yaml(config)
    parse_overrides(located, overrides)
    return located


def read(located: Located, kind: type[S]) -> S:
    """Settings of a parsed file; their task may lie in the working directory, as ``python -m`` would find it.

    Raises:
        ConfigError: Naming file, line, key and what is allowed.
    """
    from ..run.yaml_config import read_settings

    settings = read_settings(kind, located)
    task: str = settings.task  # type: ignore[attr-defined]  # every command's settings name one
    if ":" in task and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return settings
