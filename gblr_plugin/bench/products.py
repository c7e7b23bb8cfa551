"""``gblr bench``: structured products and networks against dense ones on this machine, interleaved, medians.

The matrices are random: K components with widths uniform in (0, half the axis], at any place, cyclic; ``--align`` snaps
them to a tile. What is printed is measured at once, in one process, calls taking turns. Training steps are measured by
``integration/benchmarks/training.py``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..kernels.cpu.threads import MOST_THREADS
from ..kernels.measure import interleaved_medians
from ..matrix.structure import Intervals, StructuredMatrix
from ..surgery.conversion import frozen_like
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.arguments import OneLineParser
from ..utils.files import write_text
from ..utils.tables import table
from .networks import GPT, ViT, replace_weights

__all__ = ["Row", "main", "random_structure", "speed"]

MOST = 1_000_000  # tokens, and indices of a tile
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_structure(
    m: int,
    n: int,
    relative_flops: float,
    align: int = 1,
    *,
    row_splits: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StructuredMatrix:
    """A random GBLR matrix of mixed widths with about the given relative FLOPs.

    Args:
        m: Rows.
        n: Columns.
        relative_flops: Aim for the multiply-adds over m * n.
        align: Widths and starts are multiples of this.
        row_splits: Number of matrices stacked along the rows; divides m.
        dtype: Dtype of the factors.
        seed: Of the random numbers.

    Raises:
        ConfigError: If ``align`` exceeds half an axis, or the aim is not above 0.
    """
    m //= row_splits
    if not 1 <= align <= min(m, n) // 2 or not relative_flops > 0:
        raise ConfigError(
            f"bench: align must lie in 1 .. {min(m, n) // 2}, FLOPs above 0; got {align}, {relative_flops}"
        )
    g = torch.Generator().manual_seed(seed)
    mean_cost = (m + n + 2 * align) / 4
    each = max(round(relative_flops * m * n / mean_cost), 1)
    num = each * row_splits

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length // 2 // align + 1, (num,), generator=g) * align
        start = torch.randint(0, length // align, (num,), generator=g) * align
        return Intervals(width, start, length)

    u, v = (torch.randn(num, size, generator=g) / each**0.5 for size in (m, n))
    sizes = (each,) * row_splits
    return StructuredMatrix.from_factors(u.to(dtype), v.to(dtype), intervals(m), intervals(n), sizes)


@torch.no_grad()
def speed(
    matrix: StructuredMatrix,
    tokens: int,
    plan: str = "fixed",
    seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, GBLRTensor]:
    """Median times of one dense and one structured ``F.linear``, in seconds, on the device of the matrix.

    Args:
        matrix: The weight.
        tokens: Rows of the input.
        plan: ``"fixed"`` or ``"auto"``.
        seconds: About how long to spend on each.
        clock: Where the time comes from.

    Returns:
        (dense, structured, the weight used).
    """
    weight, dense = GBLRTensor.from_structured(matrix, plan=plan), matrix.to_dense()
    x = torch.randn(tokens, matrix.shape[1], device=dense.device, dtype=dense.dtype)

    def call(w: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, w)

    times = interleaved_medians([call(dense), call(weight)], dense.device, seconds, clock=clock)
    return times[0], times[1], weight


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        section: ``"products"``, ``"bfloat16"``, ``"layers"``, ``"vit"`` or ``"gpt2"``.
        name: What was measured.
        align: Tile of the intervals.
        relative_flops: Of the structured layers together.
        dense: Seconds of the dense one.
        ours: Seconds of the structured one.
        figure: What the goal is about: the share of the ideal speed-up, 1 / relative FLOPs, or the speed-up.
        goal: What the figure should reach; None where there is no goal.
        group: Rows of one goal.
        details: Kernel, blocks, padding and memory.
        control: The first dense layer's time over that of a second one, measured in turn with the others: as far as it
            is from 1, a speed-up is noise. None where there was none.
    """

    section: str
    name: str
    align: int
    relative_flops: float
    dense: float
    ours: float
    figure: float
    goal: float | None
    group: str
    details: str = ""
    control: float | None = None

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"{self.goal:.2f}"
        return (
            f"{self.name:>28} {self.align:>5} {self.relative_flops:>6.3f} {1e3 * self.dense:>9.3f} "
            f"{1e3 * self.ours:>9.3f} {self.dense / self.ours:>8.2f} {self.figure:>7.2f} {goal:>5}  {self.details}"
        )


HEADER = (
    f"{'what':>28} {'align':>5} {'flops':>6} {'dense ms':>9} {'ours ms':>9} {'speed-up':>8} {'figure':>7} {'goal':>5}"
)
# Shares of the ideal speed-up at 25% FLOPs in float32 on a CPU: (aligned, not) for one token, and from 16 on.
SINGLE, MANY = (1.0, 0.9), (0.85, 0.7)
BFLOAT16, VIT, GPT2 = 0.7, 2.2, 1.6
LAYER = 1 / 1.05  # of any converted layer: never slower than dense beyond noise
LAYERS = ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (1024, 256), (2048, 2048), (4096, 4096))
LAYER_FLOPS = (0.15, 0.25, 0.5, 0.75)
GPT2_FLOPS = 0.437  # over all linear layers of the blocks, attention's output projection left dense


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def _product_rows(
    section: str, shapes: list[tuple[int, int]], tokens: list[int], options: argparse.Namespace, dtype: torch.dtype
) -> Iterator[Row]:
    device = torch.device(options.device)
    judged = device.type == "cpu" and options.relative_flops == 0.25
    for m, n in shapes:
        for align in options.align if section == "products" else [32]:
            matrix = random_structure(m, n, options.relative_flops, align, dtype=dtype).to(device)
            for count in tokens:
                dense, ours, weight = speed(matrix, count, options.plan, options.seconds, _clock(options))
                memory = weight.nbytes_stored / (matrix.stored * weight.factors.itemsize)
                goal, kind = None, "one token" if count == 1 else "16 and more tokens" if count >= 16 else "few tokens"
                if judged and section == "bfloat16":
                    goal, kind = BFLOAT16, "197 tokens"
                elif judged and dtype == torch.float32 and count in (1, *range(16, 1025)):
                    goal = (SINGLE if count == 1 else MANY)[align < 16]
                yield Row(
                    section,
                    f"{m}x{n}, {count} tokens",
                    align,
                    matrix.relative_flops,
                    dense,
                    ours,
                    dense / ours * matrix.relative_flops,
                    goal,
                    f"{section}, {kind}, align {align}",
                    f"{weight.plan.kernel(count)} {weight.plan.block_rows}x{weight.plan.block_cols}, "
                    f"padding {weight.packing.padding:.3f}, memory {memory:.3f}",
                )


@torch.no_grad()
def _layer_rows(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Row]:
    """Whole modules as conversion leaves them, over the dense ones: all sizes, most of all small ones."""
    for (m, n), flops, align in itertools.product(options.layers, options.layer_flops, options.align):
        if align > min(m, n) // 2:
            continue
        matrix = random_structure(m, n, flops, align, dtype=dtype)
        if matrix.relative_flops >= 1:
            continue
        dense = nn.Linear(n, m, dtype=dtype)
        twin, ours = copy.deepcopy(dense), frozen_like(dense, matrix, plan=options.plan)
        weight: Any = ours.weight
        memory = weight.nbytes_stored / (matrix.stored * weight.factors.itemsize)
        for count in options.tokens:
            x = torch.randn(count, n, dtype=dtype)

            def call(module: nn.Module, x: Tensor = x) -> Callable[[], object]:
                return lambda: module(x)

            turns = [call(dense), call(ours), call(twin)]
            times = interleaved_medians(turns, x.device, options.seconds, least=5, clock=_clock(options))
            yield Row(
                "layers",
                f"{m}x{n}, {count} tokens",
                align,
                matrix.relative_flops,
                times[0],
                times[1],
                times[0] / times[1],
                None if options.quick else LAYER,
                f"layers, {m}x{n}",
                f"{weight.plan.kernel(count)} {weight.plan.block_rows}x{weight.plan.block_cols}, memory {memory:.2f}, "
                f"control {times[0] / times[2]:.2f}",
                times[0] / times[2],
            )


def _structured(network: nn.Module, names: tuple[str, ...], flops: float, align: int, plan: str) -> float:
    """Give the named layers random structure; returns the relative FLOPs of all linear layers of the blocks."""
    costs = []

    def make(name: str, layer: nn.Linear, number: int) -> Tensor:
        m, n = layer.weight.shape
        splits = 3 if name == "qkv" else 1
        matrix = random_structure(m, n, flops, align, row_splits=splits, seed=number)
        costs.append((matrix.stored, m * n))
        weight: Tensor = GBLRTensor.from_structured(matrix, plan=plan)
        return weight

    replace_weights(network, names, make)
    linear = [layer for layer in network.get_submodule("blocks").modules() if isinstance(layer, nn.Linear)]
    total = sum(layer.weight.numel() for layer in linear)
    return 1 - sum(dense - stored for stored, dense in costs) / total


def _vit_rows(options: argparse.Namespace) -> Iterator[Row]:
    size = {"depth": 2} if options.quick else {}
    dense = ViT(**size).eval()
    for align in options.align:
        ours = ViT(**size).eval()
        flops = _structured(ours, ("qkv", "proj", "fc1", "fc2"), options.relative_flops, align, options.plan)
        for batch in (1,) if options.quick else (1, 8):
            images = torch.randn(batch, 3, 224, 224)

            def call(network: ViT, images: Tensor = images) -> Callable[[], object]:
                return lambda: network(images)

            times = interleaved_medians(
                [call(dense), call(ours)], images.device, options.seconds, clock=_clock(options)
            )
            speedup = times[0] / times[1]
            name = f"ViT-B/16 shape, batch {batch}"
            goal = None if options.quick or options.relative_flops != 0.25 else VIT
            yield Row("vit", name, align, flops, times[0], times[1], speedup, goal, f"vit, align {align}")


def _gpt2_rows(options: argparse.Namespace) -> Iterator[Row]:
    size = {"depth": 2, "words": 1000} if options.quick else {}
    dense = GPT(**size).eval()
    # Of the 12 width^2 entries of a block, proj has 1 and stays dense.
    each = (12 * GPT2_FLOPS - 1) / 11
    start, tokens = 64, 2 if options.quick else 8
    for align in options.align:
        ours = GPT(**size).eval()
        flops = _structured(ours, ("qkv", "fc1", "fc2"), each, align, options.plan)
        for head in (True, False):

            def call(network: GPT, head: bool = head) -> Callable[[], object]:
                return lambda: network.decode(start, tokens, head=head)

            times = interleaved_medians(
                [call(dense), call(ours)], torch.device("cpu"), options.seconds, clock=_clock(options)
            )
            times = [taken / tokens for taken in times]
            name = "GPT-2 shape, a token" + ("" if head else ", blocks")
            goal = None if options.quick else GPT2
            group = f"gpt2{'' if head else ' blocks'}, align {align}"
            yield Row("gpt2", name, align, flops, times[0], times[1], times[0] / times[1], goal, group)


def _rows(section: str, options: argparse.Namespace) -> Iterator[Row]:
    if section == "products":
        return _product_rows(section, options.shapes, options.tokens, options, DTYPES[options.dtype])
    if section == "layers":
        return _layer_rows(options, DTYPES[options.dtype])
    if section == "bfloat16":
        shape = (512, 512) if options.quick else (4096, 4096)
        return _product_rows(section, [shape], [197], options, torch.bfloat16)
    return _vit_rows(options) if section == "vit" else _gpt2_rows(options)


SECTIONS = ("products", "bfloat16", "layers", "vit", "gpt2")


def _shape(text: str) -> tuple[int, int]:
    try:
        m, n = (int(part) for part in text.lower().split("x"))
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


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="gblr bench", description="Time structured products against dense ones.")
    parser.add_argument("sections", nargs="*", type=_section, metavar="SECTION", help=f"{', '.join(SECTIONS)}: all")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=None, metavar="MxN", help="of products and layers")
    parser.add_argument("--tokens", nargs="+", type=_number(int, 1, MOST), default=None, help="of products and layers")
    parser.add_argument(
        "--align", nargs="+", type=_number(int, 1, MOST), default=[32, 1], help="snap intervals to these tiles"
    )
    parser.add_argument("--relative-flops", type=_number(float, 1e-3, 1), default=0.25, help="of products and vit")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of products and layers")
    parser.add_argument("--device", type=_device, default="cpu", help="of products")
    parser.add_argument("--threads", type=_number(int, 1, MOST_THREADS), default=torch.get_num_threads())
    parser.add_argument("--plan", choices=("fixed", "factors", "auto"), default="fixed")
    parser.add_argument("--seconds", type=_number(float, 0, 3600), default=0.3, help="time spent on each entry")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run; no goals")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall time, for a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--wait",
        type=_number(float, 0, 3600),
        default=60.0,
        help="seconds to wait before a section for a quiet machine",
    )
    return parser


def _settle(threads: int, patience: float) -> float:
    """Wait until only our own load is left, at most this long; returns the load average over the last minute."""
    end = time.monotonic() + patience
    while os.getloadavg()[0] > threads + 0.5 and time.monotonic() < end:
        time.sleep(min(5.0, max(end - time.monotonic(), 0.0)))
    return os.getloadavg()[0]


def _summary(rows: list[Row]) -> list[str]:
    """A line per goal: median and worst figure, and where the worst was."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.goal is not None:
            groups.setdefault(row.group, []).append(row)
    cells = []
    for group, members in groups.items():
        controls = [row.control for row in members if row.control is not None]
        noise = f"; dense against dense {min(controls):.2f} to {max(controls):.2f}" if controls else ""
        worst = min(members, key=lambda row: row.figure)
        median = statistics.median(row.figure for row in members)
        reached = "" if worst.figure >= members[0].goal else "  below the goal"  # type: ignore[operator]  # not None
        figures = [f"{value:.2f}" for value in (members[0].goal, median, worst.figure)]
        cells.append([group, *figures, f"{worst.name}{reached}{noise}"])
    return table(["goal of", "goal", "median", "worst", "worst case"], cells, left=(0, 4)) if cells else []


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, print tables; returns the exit code.

    The figure of a product is its speed-up over the ideal one, 1 / relative FLOPs; that of a network its speed-up.

    Raises:
        ConfigError: If the JSON file cannot be written.
    """
    options = _parser().parse_args(argv)
    options.layers = options.shapes or [(64, 64)] * options.quick or LAYERS
    options.layer_flops = LAYER_FLOPS[1:2] if options.quick else LAYER_FLOPS
    options.shapes = options.shapes or [(256, 384)] * options.quick or [(3072, 768), (4096, 4096)]
    options.tokens = options.tokens or [1, 16] * options.quick or [1, 2, 4, 16, 64, 256, 1024]
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(before)


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
        load = _settle(options.threads, options.wait)
        busy = "" if load <= options.threads + 0.5 else " (busy: times are not to be trusted)"
        print(f"\n{section}: load average {load:.2f}{busy}\n{HEADER}")
        for row in _rows(section, options):
            rows.append(row)
            print(row, flush=True)
        loads[section] = (load, os.getloadavg()[0])
    summary = _summary(rows)
    print("", *summary, sep="\n")
    if options.json is not None:
        found = {"title": title, "loads": loads, "rows": [asdict(row) for row in rows]}
        try:
            write_text(options.json, json.dumps(found, indent=1))
        except OSError as error:
            raise ConfigError(f"--json: cannot write {str(options.json)!r}: {error.strerror}") from error
    return 0
