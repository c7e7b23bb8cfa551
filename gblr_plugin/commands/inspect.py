"""``gblr inspect``: what the files of a compressed model hold."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..utils.arguments import add_command, common_flags

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "inspect",
        "show structure, kernels and bytes of a compressed model's files",
        _inspect,
        flags=common_flags("json"),
        examples=(
            "gblr inspect outputs/digits_vit",
            "gblr inspect model.safetensors --figure structure.png",
            "gblr inspect path/to/compressed --json",
        ),
    )
    parser.add_argument(
        "path", type=Path, metavar="FOLDER|FILE", help="the output of gblr run or gblr compress, or a file of gblr.save"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw where the blocks lie")


def _inspect(arguments: argparse.Namespace) -> None:
    from ..serialization.container import shard_paths
    from ..serialization.inspection import inspect_files

    path: Path = arguments.path
    files = shard_paths(path, "inspect") if path.is_dir() else [path]
    contents = inspect_files(files)
    if arguments.figure is not None:
        _draw(files, arguments.figure)
    print(contents.to_json() if arguments.json else contents)


def _draw(files: list[Path], figure: Path) -> None:
    from ..serialization.inspection import read_weights
    from ..utils.files import write_atomic

    try:
        from .. import plot
    except ImportError as error:
        raise ConfigError("inspect: --figure needs matplotlib: pip install 'gblr-plugin[plot]'") from error
    drawn = plot.structure(read_weights(files))
    try:
        write_atomic(figure, partial(drawn.savefig, format="png", dpi=150))
    except OSError as error:
        raise ConfigError(f"inspect: --figure: cannot write {str(figure)!r}: {error.strerror}") from error
