"""The command ``gblr bench``: its arguments, its tables and its file."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ..errors import ConfigError
from ..kernels.cpu.threads import MOST_THREADS
from ..utils.arguments import OneLineParser, common_flags
from ..utils.files import write_text
from ..utils.running import torch_threads
from ..utils.tables import table
from .products import DTYPES, LAYER_FLOPS, LAYERS, SECTIONS, Row, rows_of

__all__ = ["bench", "make_parser"]

MOST = 1_000_000  # tokens, and indices of a tile
HEADER = (
    f"{'what':>28} {'align':>5} {'flops':>6} {'dense ms':>9} {'ours ms':>9} {'speed-up':>8} {'figure':>7} {'goal':>5}"
)


def _shape(text: str) -> tuple[int, int]:
    try:
        m, n = (int(size) for size in text.lower().split("x"))
    except ValueError:
        m = n = 0
    if min(m, n) < 1:
        raise argparse.ArgumentTypeError(f"shape {text!r} must look like 3072x768")
    return m, n


def _section(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"section {text!r} must be one of {', '.join(SECTIONS)}")
    return text


def _number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """A reader of numbers from ``least`` to ``most``."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {what} from {least} to {most}")
        return value

    return read


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text!r} is no device that torch can use here") from error
    return text


def make_parser() -> argparse.ArgumentParser:
    """The parser of the arguments after ``gblr bench``."""
    count, seconds = _number(int, 1, MOST), _number(float, 0, 3600)
    parser = OneLineParser(
        prog="gblr bench",
        description="Time structured products against dense ones.",
        parents=[common_flags(output="also write the rows to this file, as JSON")],
    )
    add = parser.add_argument
    add("sections", nargs="*", type=_section, metavar="SECTION", help=f"{', '.join(SECTIONS)}: all")
    add("--shapes", nargs="+", type=_shape, default=None, metavar="MxN", help="of products and layers")
    add("--tokens", nargs="+", type=count, default=None, help="of products and layers")
    add("--align", nargs="+", type=count, default=[32, 1], help="snap intervals to these tiles")
    add("--relative-flops", type=_number(float, 1e-3, 1), default=0.25, help="of products and vit")
    add("--dtype", choices=DTYPES, default="float32", help="of products and layers")
    add("--device", type=_device, default="cpu", help="of products")
    add("--threads", type=_number(int, 1, MOST_THREADS), default=torch.get_num_threads())
    add("--plan", choices=("fixed", "factors", "auto"), default="fixed")
    add("--seconds", type=seconds, default=0.3, help="time spent on each entry")
    add("--quick", action="store_true", help="small sizes: does everything run; no goals")
    add("--cpu-time", action="store_true", help="CPU seconds instead of wall time, for a busy machine")
    add("--wait", type=seconds, default=60.0, help="seconds to wait before a section for a quiet machine")
    parser.set_defaults(call=bench)
    return parser


def _wait(threads: int, patience: float) -> float:
    """Wait until no other load is left, at most this long; returns the load average over the last minute."""
    end = time.monotonic() + patience
    while os.getloadavg()[0] > threads + 0.5 and time.monotonic() < end:
        time.sleep(min(5.0, max(end - time.monotonic(), 0.0)))
    return os.getloadavg()[0]


def _summary(rows: list[Row]) -> list[str]:
    """A line per goal: median and worst figure, and where the worst was."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.goal is not None:
            groups.setdefault((row.group, row.goal), []).append(row)
    cells = []
    for (group, goal), members in groups.items():
        controls = [row.control for row in members if row.control is not None]
        noise = f"; dense against dense {min(controls):.2f} to {max(controls):.2f}" if controls else ""
        worst = min(members, key=lambda row: row.figure)
        verdict = "" if worst.figure >= goal else "  below the goal"
        figures = goal, statistics.median(row.figure for row in members), worst.figure
        cells.append([group, *(f"{value:.2f}" for value in figures), f"{worst.name}{verdict}{noise}"])
    return table(["goal of", "goal", "median", "worst", "worst case"], cells, left=(0, 4)) if cells else []


def bench(options: argparse.Namespace) -> int:
    """Measure and print tables; returns the exit code.

    The figure of a product is its speed-up over the ideal one, 1 / relative FLOPs; that of a network its speed-up.

    Args:
        options: From :func:`make_parser`.

    Raises:
        ConfigError: If the JSON file cannot be written.
    """
    options.layers = options.shapes or [(64, 64)] * options.quick or LAYERS
    options.layer_flops = LAYER_FLOPS[1:2] if options.quick else LAYER_FLOPS
    options.shapes = options.shapes or [(256, 384)] * options.quick or [(3072, 768), (4096, 4096)]
    options.tokens = options.tokens or [1, 16] * options.quick or [1, 2, 4, 16, 64, 256, 1024]
    with torch_threads(options.threads):
        return _run(options)


@torch.no_grad()
def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    title = f"torch {torch.__version__}, {name}, {options.threads} threads, plan {options.plan}"
    title += ", CPU time" if options.cpu_time else ""
    print(title)
    rows: list[Row] = []
    loads: dict[str, tuple[float, float]] = {}
    for section in dict.fromkeys(options.sections or SECTIONS):
        load = _wait(options.threads, options.wait)
        busy = "" if load <= options.threads + 0.5 else " (busy: times are not to be trusted)"
        print(f"\n{section}: load average {load:.2f}{busy}\n{HEADER}")
        for row in rows_of(section, options):
            rows.append(row)
            print(row, flush=True)
        loads[section] = (load, os.getloadavg()[0])
    print("", *_summary(rows), sep="\n")
    if options.output is not None:
        found = {"title": title, "loads": loads, "rows": [asdict(row) for row in rows]}
        try:
            write_text(options.output, json.dumps(found, indent=1))
        except OSError as error:
            raise ConfigError(f"--output: cannot write {str(options.output)!r}: {error.strerror}") from error
    return 0
