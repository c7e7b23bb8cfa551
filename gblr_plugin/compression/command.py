"""``gblr compress``: its arguments, and which of two ways a model is compressed.

With ``--calibration`` the model is in memory, its layers are fitted to what they do on the user's data and the result
is measured (:mod:`.pretrained`). Without it, the weights of a folder are approximated one by one, so that it may be
larger than memory (:mod:`gblr_plugin.huggingface.compress_folder`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, GBLRError
from ..utils.arguments import add_command, common_flags
from ..utils.console import Console, captured_output
from ..utils.progress import shown_by

__all__ = ["add_parser"]

_WHO = "compress"
# Options of one way alone, by their names in the parsed arguments.
_OF_CALIBRATED = ("eval", "samples", "length", "dtype", "allocation", "refine", "recover")
_OF_STREAMED = ("method",)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "compress",
        "compress a pretrained model of transformers into a new folder",
        _compress,
        flags=common_flags(
            *("dry_run", "fresh", "json", "verbose", "quiet"),
            output="a new folder, or one to go on with",
            required=True,
        ),
        examples=(
            "gblr compress path/to/model --budget 0.5 --calibration texts.txt --eval held-out.txt --output half",
            "gblr compress path/to/model --budget 0.5 --calibration texts.txt --output half --dry-run",
            "gblr compress path/to/model --budget 0.5 --output half",
        ),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json and safetensors, or a name in the local cache")
    add("--budget", type=float, required=True, help="relative FLOPs of the layers, in (0, 1]")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add(
        "--calibration",
        type=Path,
        metavar="DATA",
        help="a text file, JSON lines with a field text, or a folder of images",
    )
    add("--eval", type=Path, metavar="DATA", help="the same; held-out data on which quality and speed are measured")
    add("--samples", type=int, metavar="N", help="read of each; default: 512 texts, 256 sequences or images")
    add("--length", type=int, metavar="N", help="tokens of a sequence (default: 256), most tokens of a text (128)")
    layers = parser.add_argument_group("layers")
    add = layers.add_argument
    add("--layers", nargs="+", metavar="PATTERN", help="default: all that can gain")
    add("--exclude", nargs="+", default=[], metavar="PATTERN")
    add("--family", metavar="NAME", help="a structure family in place of GBLR, such as monarch")
    add("--align", type=int, default=1, metavar="T", help="intervals on multiples of T")
    add("--row-splits", nargs="+", default=[], metavar="PATTERN=N", help="matrices packed in the rows of these layers")
    add("--factor-dtype", choices=["int8"], help="default: that of the weights")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the output; default: that of the model")
    fit = parser.add_argument_group("fitting")
    add = fit.add_argument
    add("--allocation", metavar="RULE", help="how the budget is split over the layers; default: what measured best")
    add("--refine", type=int, metavar="STEPS", help="gradient steps for each block; default: what measured best")
    add("--recover", type=int, metavar="STEPS", help="distillation steps of the whole network; default: none")
    add("--method", help="without --calibration: as gblr_plugin.decompose takes it; default: gblr, the best")
    add("--seed", type=int, default=0)
    add("--threads", type=int, metavar="N", help="default: as torch chooses")


def _compress(arguments: argparse.Namespace) -> None:
    from ..kernels.cpu.threads import MOST_THREADS
    from ..utils.running import torch_threads

    if arguments.threads is not None and not 1 <= arguments.threads <= MOST_THREADS:
        raise ConfigError(f"--threads must be a whole number from 1 to {MOST_THREADS}, got {arguments.threads}")
    calibrated = arguments.calibration is not None
    if calibrated and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--calibration is for one process; several can compress without it")
    for name in _OF_STREAMED if calibrated else _OF_CALIBRATED:
        if getattr(arguments, name) is not None:
            rule = "is for compression without --calibration" if calibrated else "needs --calibration"
            raise ConfigError(f"--{name.replace('_', '-')} {rule}")
    with captured_output(arguments.verbose) as captured, torch_threads(arguments.threads):
        console = Console(captured.errors, arguments.quiet)
        if arguments.fresh and not arguments.dry_run:
            _forget(arguments.output)
        try:
            with shown_by(console.progress):
                result, values = (_calibrated if calibrated else _streamed)(arguments)
        except OSError as error:
            place = f" {error.filename!r}" if error.filename else ""
            raise GBLRError(
                f"{_WHO}: {error.strerror or error}{place}; the same command goes on where it was"
            ) from error
        finally:
            console.clear()
    if result is not None:
        print(json.dumps(values, indent=1) if arguments.json else result)


def _forget(output: Path) -> None:
    """Remove what an interrupted command left in the output."""
    from ..utils.unfinished import WORK

    if (output / WORK).is_dir():
        shutil.rmtree(output / WORK)


def _streamed(arguments: argparse.Namespace) -> tuple[object, Mapping[str, Any]]:
    """One weight in memory at a time; ``None`` on all processes but the first."""
    from ..huggingface.compress_folder import CompressSettings, compress_folder
    from ..huggingface.folders import empty_network
    from ..huggingface.pretrained import find_folder
    from ..surgery.selection import select_layers
    from .forecast import forecast

    settings = CompressSettings(
        arguments.budget,
        _patterns(arguments.layers),
        tuple(arguments.exclude),
        arguments.method or "gblr",
        arguments.align,
        _row_splits(arguments.row_splits),
        arguments.seed,
        arguments.factor_dtype,
        arguments.family,
    )
    folder = find_folder(arguments.model, _WHO)
    if arguments.dry_run:
        network = empty_network(folder, _WHO)
        planned = forecast(network, select_layers(network, settings.include, settings.exclude), None)
        return planned, planned.to_dict()
    summary = compress_folder(folder, arguments.output, settings)
    return summary and f"{summary}; in {arguments.output}", asdict(summary) if summary else {}


def _calibrated(arguments: argparse.Namespace) -> tuple[object, Mapping[str, Any]]:
    """The whole model in memory, fitted to data."""
    from .folder import REPORT, FolderJob

    names = (
        "budget",
        "family",
        "layers",
        "exclude",
        "allocation",
        "align",
        "refine",
        "recover",
        "factor_dtype",
        "seed",
    )
    given = {name: getattr(arguments, name) for name in names}
    settings = {name: value for name, value in given.items() if value is not None}
    settings["row_splits"] = _row_splits(arguments.row_splits)
    job = FolderJob(
        arguments.model,
        arguments.output,
        settings,
        arguments.calibration,
        arguments.eval,
        arguments.samples,
        arguments.length,
        arguments.dtype,
    )
    if arguments.dry_run:
        planned = job.forecast()
        return planned, planned.to_dict()
    report = job.run()
    values = json.loads((arguments.output / REPORT).read_text(encoding="utf-8"))
    return f"{report}\n\neverything is in {arguments.output}", values


def _patterns(given: list[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(given)


def _row_splits(given: list[str]) -> dict[str, int] | int:
    splits = {}
    for text in given:
        pattern, _, count = text.rpartition("=")
        if not pattern or not count.isdigit() or int(count) < 1:
            raise ConfigError(f"--row-splits: need PATTERN=N with a positive N, got {text!r}")
        splits[pattern] = int(count)
    return splits or 1
