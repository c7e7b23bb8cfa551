"""``gblr report``: the result of an earlier command, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..utils.arguments import add_command, common_flags

__all__ = ["add_parser", "result_file"]

FILES = ("report.json", "compress.json", "comparison.json", "search.json")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "report",
        "show the result of an earlier run, compression, comparison or search",
        _show,
        flags=common_flags("json"),
        examples=("gblr report outputs/digits_vit", "gblr report outputs/digits_vit/report.json --json"),
    )
    parser.add_argument("path", type=Path, metavar="PATH", help=f"an output folder, or its {' or '.join(FILES)}")


def result_file(path: Path) -> Path:
    """The file of a result: the path itself, or the one that lies in a folder."""
    if not path.is_dir():
        return path
    return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])


def _show(arguments: argparse.Namespace) -> None:
    file = result_file(arguments.path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        result = _read(values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"report: no file at {str(file)!r}; need a folder with {' or '.join(FILES)}") from error
    except OSError as error:
        raise ConfigError(f"report: cannot read {str(file)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"report: {str(file)!r} is no result of gblr run, compress, compare or search") from error
    print(json.dumps(values, indent=2) if arguments.json else result)


def _read(values: Mapping[str, Any]) -> object:
    """The result that a file holds, by its format."""
    from ..compression.report import CompressionReport
    from ..run.comparison_report import ComparisonReport
    from ..run.search_report import SearchReport
    from ..run.summary import RunReport

    kinds: dict[Any, Any] = {kind.FORMAT: kind for kind in (RunReport, ComparisonReport, SearchReport)}
    return kinds.get(values.get("format"), CompressionReport).from_dict(dict(values))
