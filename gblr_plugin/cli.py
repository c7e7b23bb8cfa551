"""The ``gblr`` command. Exit codes: 0 done, 2 bad config or arguments (one line), 1 anything else."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__
from .compression import command as compress
from .errors import ConfigError, GBLRError, first_line
from .utils.arguments import OneLineParser

if TYPE_CHECKING:
    from .run.yaml_config import Located

__all__ = ["main"]

S = TypeVar("S")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="gblr", description="Learned structured matrices: compress networks that really run faster."
    )
    parser.add_argument("--version", action="version", version=f"gblr-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser, metavar="COMMAND")
    changes = OneLineParser(add_help=False)
    changes.add_argument(
        "--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of a config; repeatable"
    )
    config = OneLineParser(add_help=False, parents=[changes])
    config.add_argument("config", type=Path, metavar="CONFIG.yaml")
    config.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/ and the config's name")

    run = commands.add_parser("run", help="train or load, compress, fine-tune, convert, report", parents=[config])
    run.add_argument(
        "--trial", action="store_true", help="as a trial of an NNI experiment: its parameters in, its results out"
    )
    run.add_argument(
        "--flops-price", type=float, default=0.0, metavar="P", help="what relative FLOPs of 1 cost a trial's result"
    )
    run.set_defaults(call=_run)
    search = commands.add_parser(
        "search", help="vary a run by NNI's tuners; a Pareto table and figure of the trials", parents=[config]
    )
    search.set_defaults(call=_search)
    compare = commands.add_parser(
        "compare",
        help="many methods at equal multiply-adds over several budgets; goes on where it stopped",
        parents=[config],
    )
    compare.set_defaults(call=_compare)
    shown = commands.add_parser(
        "report", help="show the report of an earlier run, or count what a config asks for", parents=[changes]
    )
    shown.add_argument("path", type=Path, metavar="PATH", help="an output folder, a report.json, or a config.yaml")
    shown.add_argument("--json", action="store_true", help="as JSON instead of a table")
    shown.set_defaults(call=_show)
    compress.add_parser(commands)
    bench = commands.add_parser("bench", help="time structured against dense layers", add_help=False)
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        # argparse would take the benchmark's own options for ours.
        return _guarded(lambda: _bench(argv[1:]))
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return _guarded(lambda: arguments.call(arguments))


def _guarded(command: Callable[[], int | None]) -> int:
    """The exit code of a command; its error in one line on standard error."""
    try:
        code = int(command() or 0)
        sys.stdout.flush()
    except ConfigError as error:
        return _fail(2, str(error))
    except KeyboardInterrupt:
        return _fail(1, "interrupted")
    except BrokenPipeError:  # the reader of our output left; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except GBLRError as error:
        return _fail(1, str(error))
    except Exception as error:
        return _fail(1, f"{type(error).__name__}: {error} (details in {_saved_traceback()})")
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


def _bench(arguments: Sequence[str]) -> int:
    from .bench.command import main as bench

    return int(bench(arguments) or 0)


def _show(arguments: argparse.Namespace) -> None:
    if arguments.path.suffix in (".yaml", ".yml"):
        _count(arguments.path, arguments.set, arguments.json)
    else:
        _report(arguments.path, arguments.json)


def _report(path: Path, as_json: bool) -> None:
    from .compression.report import CompressionReport
    from .run.summary import RunReport

    kinds: dict[str, Any] = {"report.json": RunReport, "compress.json": CompressionReport}
    files = [path / name for name in kinds if (path / name).is_file()] or [path / "report.json"]
    file = files[0] if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
        summary = kinds.get(file.name, RunReport).from_dict(values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"report: no file at {str(file)!r}") from error
    except OSError as error:
        raise ConfigError(f"report: cannot read {str(file)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"report: {str(file)!r} is not a report of gblr run or gblr compress") from error
    print(json.dumps(values, indent=2) if as_json else summary)


def _count(config: Path, overrides: list[str], as_json: bool) -> None:
    from .run.console import captured_output
    from .run.settings import RunSettings

    settings = _read(_located(config, overrides), RunSettings)
    with captured_output():  # importing the hosts is noisy
        from .run.counting import count_config

        counted = count_config(settings)
    print(counted.to_json() if as_json else counted)


def _located(config: Path, overrides: list[str]) -> Located:
    from .run.yaml_config import load_yaml, parse_overrides

    located = load_yaml(config)
    parse_overrides(located, overrides)
    return located


def _read(located: Located, kind: type[S]) -> S:
    from .run.yaml_config import read_settings

    settings = read_settings(kind, located)
    task: str = settings.task  # type: ignore[attr-defined]  # every command's settings name one
    if ":" in task and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own task, as `python -m` would find it
    return settings


def _run(arguments: argparse.Namespace) -> None:
    from .run.settings import RunSettings

    if arguments.trial:
        return _trial(arguments)
    if arguments.flops_price:
        raise ConfigError("--flops-price goes with --trial")
    settings = _read(_located(arguments.config, arguments.set), RunSettings)

    def prepare() -> Any:
        from .run.pipeline import prepare_run

        return prepare_run(settings)

    output = _output(arguments)
    _carry_out(prepare, output, f"see it with: tensorboard --logdir {output / 'tensorboard'}")


def _trial(arguments: argparse.Namespace) -> None:
    from .run.console import captured_output
    from .run.search_space import overrides
    from .run.settings import RunSettings
    from .run.yaml_config import parse_overrides

    located = _located(arguments.config, arguments.set)
    with captured_output():  # importing the hosts is noisy
        from .run.trial import Trial, next_parameters

        parameters, output = next_parameters(arguments.output)
    parse_overrides(located, overrides(parameters, located.data))
    settings = _read(located, RunSettings)
    _carry_out(lambda: Trial(settings, parameters, arguments.flops_price), output)


def _search(arguments: argparse.Namespace) -> None:
    from .run.search_settings import SearchSettings, refuse_plain_experiment

    located = _located(arguments.config, arguments.set)
    refuse_plain_experiment(located)
    _read(located, SearchSettings)

    def prepare() -> Any:
        from .run.search import Search

        return Search(located)

    output = _output(arguments)
    _carry_out(prepare, output, f"the front is drawn in {output / 'search.png'}")


def _compare(arguments: argparse.Namespace) -> None:
    from .run.comparison_settings import ComparisonSettings

    settings = _read(_located(arguments.config, arguments.set), ComparisonSettings)

    def prepare() -> Any:
        from .run.comparison import Comparison

        return Comparison(settings)

    _carry_out(prepare, _output(arguments))


def _output(arguments: argparse.Namespace) -> Path:
    output: Path | None = arguments.output
    return output or Path("outputs", arguments.config.stem)


def _carry_out(prepare: Callable[[], Any], output: Path, hint: str = "") -> None:
    """Prepare a job and run it into a folder; the terminal shows our lines alone.

    Args:
        prepare: Makes an object with ``run(output, console)``; all that can be refused is refused there, before
            anything is written.
        output: The folder.
        hint: What else to say after the result.
    """
    from .run.console import Console, captured_output

    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {str(output)!r} is a file, need a folder")
    with captured_output() as captured:  # importing the hosts is noisy, and so are they
        job = prepare()
        log = output / "run.log"
        try:
            output.mkdir(parents=True, exist_ok=True)
            captured.send_to(log)
        except OSError as error:
            raise ConfigError(f"--output: cannot write to {str(output)!r}: {error.strerror}") from error
        console = Console(captured.terminal)
        try:
            result = job.run(output, console)
        except ConfigError:
            raise
        except Exception as error:
            traceback.print_exc()
            name, reason = type(error).__name__, first_line(error)
            shown = name if reason == name else f"{name}: {reason}"
            raise GBLRError(f"the run failed: {shown} (details in {log})") from error
        console.line(f"\n{result}\n")
        console.line(f"everything is in {output}{'; ' if hint else ''}{hint}")


if __name__ == "__main__":
    raise SystemExit(main())
