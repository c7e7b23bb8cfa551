"""What ``gblr bench`` measures: structured products and networks against dense ones on this machine.

The matrices are random (:func:`~gblr_plugin.bench.structures.random_structure`). Calls take turns in one process, and
medians are printed. ``integration/benchmarks/training.py`` measures training steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..matrix.structure import StructuredMatrix
from ..surgery.conversion import frozen_like
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.timing import interleaved_medians
from .networks import GPT, ViT, replace_weights
from .structures import random_structure

__all__ = ["DTYPES", "LAYERS", "LAYER_FLOPS", "SECTIONS", "Row", "random_structure", "rows_of", "speed"]

SECTIONS = ("products", "bfloat16", "layers", "vit", "gpt2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Goals. Of a product in float32 on a CPU at 25% of FLOPs: shares of the ideal speed-up, (aligned, not), for one token
# and from 16 tokens on. Of a converted layer of any size: no slower than dense but for noise.
SINGLE, MANY = (1.0, 0.9), (0.85, 0.7)
BFLOAT16, VIT, GPT2, LAYER = 0.7, 2.2, 1.6, 1 / 1.05
LAYERS = ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (1024, 256), (2048, 2048), (4096, 4096))
LAYER_FLOPS = (0.15, 0.25, 0.5, 0.75)
GPT2_FLOPS = 0.437  # over all linear layers of the blocks, of which the output projection of attention stays dense


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
        plan: ``"fixed"``, ``"factors"`` or ``"auto"``.
        seconds: About how long to spend on each.
        clock: Where the time comes from.

    Returns:
        (dense, structured, the weight used).
    """
    weight, dense = GBLRTensor.from_structured(matrix, plan=plan), matrix.to_dense()
    x = torch.randn(tokens, matrix.shape[1], device=dense.device, dtype=dense.dtype)
    calls = [lambda: F.linear(x, dense), lambda: F.linear(x, weight)]
    times = interleaved_medians(calls, dense.device, seconds, clock=clock)
    return times[0], times[1], weight


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        section: One of :data:`SECTIONS`.
        name: What was measured.
        align: Tile of the intervals.
        relative_flops: Of the structured layers together.
        dense: Seconds of the dense call.
        ours: Seconds of the structured call.
        figure: What the goal is about: the share of the ideal speed-up, 1 / relative FLOPs, or the speed-up.
        goal: What the figure should reach; ``None`` where there is no goal.
        group: Name of the rows that share a goal.
        details: Kernel, blocks, padding and memory.
        control: The dense layer's time over that of a second dense layer, measured in the same turns; its distance from
            1 is noise. ``None`` where there was no second one.
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


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def _medians(options: argparse.Namespace, calls: Sequence[Callable[[], object]], least: int = 3) -> list[float]:
    return interleaved_medians(calls, torch.device("cpu"), options.seconds, least, _clock(options))


def _described(weight: Any, tokens: int, matrix: StructuredMatrix, padding: bool) -> str:
    memory = weight.nbytes_stored / (matrix.stored * weight.factors.itemsize)
    kernel = f"{weight.plan.kernel(tokens)} {weight.plan.block_rows}x{weight.plan.block_cols}"
    return (
        f"{kernel}, padding {weight.packing.padding:.3f}, memory {memory:.3f}"
        if padding
        else (f"{kernel}, memory {memory:.2f}")
    )


def _product_rows(section: str, options: argparse.Namespace) -> Iterator[Row]:
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    shapes, tokens, tiles = options.shapes, options.tokens, options.align
    if section == "bfloat16":
        shapes, tokens, tiles, dtype = [(512, 512) if options.quick else (4096, 4096)], [197], [32], torch.bfloat16
    judged = device.type == "cpu" and options.relative_flops == 0.25
    for (m, n), align in itertools.product(shapes, tiles):
        matrix = random_structure(m, n, options.relative_flops, align, dtype=dtype).to(device)
        for count in tokens:
            dense, ours, weight = speed(matrix, count, options.plan, options.seconds, _clock(options))
            goal, kind = None, "one token" if count == 1 else "16 and more tokens" if count >= 16 else "few tokens"
            if judged and section == "bfloat16":
                goal, kind = BFLOAT16, "197 tokens"
            elif judged and dtype == torch.float32 and count in (1, *range(16, 1025)):
                goal = (SINGLE if count == 1 else MANY)[align < 16]
            name, group = f"{m}x{n}, {count} tokens", f"{section}, {kind}, align {align}"
            flops, details = matrix.relative_flops, _described(weight, count, matrix, padding=True)
            yield Row(section, name, align, flops, dense, ours, dense / ours * flops, goal, group, details)


@torch.no_grad()
def _layer_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Modules as conversion leaves them, of all sizes, against the dense ones."""
    dtype = DTYPES[options.dtype]
    for (m, n), flops, align in itertools.product(options.layers, options.layer_flops, options.align):
        if align > min(m, n) // 2:
            continue
        matrix = random_structure(m, n, flops, align, dtype=dtype)
        if matrix.relative_flops >= 1:
            continue
        dense = nn.Linear(n, m, dtype=dtype)
        modules = dense, frozen_like(dense, matrix, plan=options.plan), copy.deepcopy(dense)
        for count in options.tokens:
            x = torch.randn(count, n, dtype=dtype)
            times = _medians(options, [partial(module, x) for module in modules], least=5)
            speedup, control, goal = times[0] / times[1], times[0] / times[2], None if options.quick else LAYER
            details = f"{_described(modules[1].weight, count, matrix, padding=False)}, control {control:.2f}"
            name, found = f"{m}x{n}, {count} tokens", (align, matrix.relative_flops, times[0], times[1], speedup)
            yield Row("layers", name, *found, goal, f"layers, {m}x{n}", details, control)


def _structured(network: nn.Module, names: tuple[str, ...], flops: float, align: int, plan: str) -> float:
    """Give the named layers random structure; returns the relative FLOPs of all linear layers of the blocks."""
    costs = []

    def make(name: str, layer: nn.Linear, number: int) -> Tensor:
        m, n = layer.weight.shape
        matrix = random_structure(m, n, flops, align, row_splits=3 if name == "qkv" else 1, seed=number)
        costs.append((matrix.stored, m * n))
        weight: Tensor = GBLRTensor.from_structured(matrix, plan=plan)
        return weight

    replace_weights(network, names, make)
    linear = [layer for layer in network.get_submodule("blocks").modules() if isinstance(layer, nn.Linear)]
    return 1 - sum(dense - stored for stored, dense in costs) / sum(layer.weight.numel() for layer in linear)


def _vit_rows(options: argparse.Namespace) -> Iterator[Row]:
    size, goal = ({"depth": 2}, None) if options.quick else ({}, VIT if options.relative_flops == 0.25 else None)
    dense = ViT(**size).eval()
    for align in options.align:
        ours = ViT(**size).eval()
        flops = _structured(ours, ("qkv", "proj", "fc1", "fc2"), options.relative_flops, align, options.plan)
        for batch in (1,) if options.quick else (1, 8):
            images = torch.randn(batch, 3, 224, 224)
            slow, fast = _medians(options, [partial(network, images) for network in (dense, ours)])
            name = f"ViT-B/16 shape, batch {batch}"
            yield Row("vit", name, align, flops, slow, fast, slow / fast, goal, f"vit, align {align}")


def _gpt2_rows(options: argparse.Namespace) -> Iterator[Row]:
    size, goal, tokens = ({"depth": 2, "words": 1000}, None, 2) if options.quick else ({}, GPT2, 8)
    dense = GPT(**size).eval()
    each = (12 * GPT2_FLOPS - 1) / 11  # of the 12 width^2 entries of a block, the output projection has 1
    for align in options.align:
        ours = GPT(**size).eval()
        flops = _structured(ours, ("qkv", "fc1", "fc2"), each, align, options.plan)
        for head in (True, False):
            calls = [partial(network.decode, 64, tokens, head=head) for network in (dense, ours)]
            slow, fast = (seconds / tokens for seconds in _medians(options, calls))
            name, group = ("GPT-2 shape, a token", "gpt2") if head else ("GPT-2 shape, a token, blocks", "gpt2 blocks")
            yield Row("gpt2", name, align, flops, slow, fast, slow / fast, goal, f"{group}, align {align}")


def rows_of(section: str, options: argparse.Namespace) -> Iterator[Row]:
    """Measure a section of the benchmark, one of :data:`SECTIONS`."""
    if section in ("products", "bfloat16"):
        return _product_rows(section, options)
    return {"layers": _layer_rows, "vit": _vit_rows, "gpt2": _gpt2_rows}[section](options)
