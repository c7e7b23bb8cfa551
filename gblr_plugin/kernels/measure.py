"""Measured plans: packs the candidates of the cost model, times their products here, and keeps the fastest plan."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matrix.structure import StructuredMatrix
from ..utils.timing import interleaved_medians
from . import compiled, product
from .layout import Layout
from .packing import pack_for
from .plan import MATRIX, Plan, candidates

__all__ = ["circumstances", "is_stale", "measured_plan"]

KEEP = 3  # number of candidates of the compiled kernel that are timed
SECONDS = 0.02  # about the most for each candidate and bucket
_CACHE: dict[tuple[object, ...], Plan] = {}


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """The device, dtype, threads and processor for which a measurement holds, as fields of a plan."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    name = str(dtype).removeprefix("torch.")
    return {"device": device.type, "dtype": name, "threads": torch.get_num_threads(), "machine": machine}


@cache
def _processor() -> str:
    """Name of the processor and the vector instructions that torch uses there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def is_stale(plan: Plan, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a plan was measured on another device, processor, dtype or number of threads."""
    return plan.measured and any(getattr(plan, name) != value for name, value in circumstances(device, dtype).items())


def _key(matrix: StructuredMatrix) -> tuple[object, ...]:
    ends = (matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start)
    structure = tuple(end.cpu().numpy().tobytes() for end in ends)
    device = matrix.u.device
    return (*structure, matrix.shape, matrix.split_sizes, matrix.u.dtype, str(device), torch.get_num_threads())


def _plans(matrix: StructuredMatrix, int8: bool) -> list[Plan]:
    """Plans to time, most of them for the compiled kernel, where there is one."""
    kernels = ["compiled"] if compiled.available(matrix.u.device, matrix.u.dtype) else []
    return [
        plan
        for kernel in [*kernels, "blocks"]
        for plan in candidates(matrix, kernel=kernel, int8=int8)[: KEEP if kernel == "compiled" or not kernels else 1]
    ]


@torch.no_grad()
def measured_plan(matrix: StructuredMatrix, buckets: tuple[int, ...] = (1, 16, 256), int8: bool = False) -> Plan:
    """Time the candidates, and the dense product, on the device and in the dtype of the factors.

    Args:
        matrix: The weight.
        buckets: Numbers of tokens to time; a kernel is chosen for each.
        int8: Whether the factors will be int8, which decides the plans within the memory limit. Factors are timed as
            they are.

    Returns:
        The plan whose times over those of the dense product, at most 1, have the least geometric mean over the buckets.
        Where dense is faster the plan uses it, with the matrix beside the factors. Equal structures on one device reuse
        the measurement.
    """
    key = (*_key(matrix), buckets, int8)
    if key not in _CACHE:
        _CACHE[key] = _measure(matrix, buckets, int8)
    return _CACHE[key]


def _measure(matrix: StructuredMatrix, buckets: tuple[int, ...], int8: bool) -> Plan:
    device, dtype = matrix.u.device, matrix.u.dtype
    facts = circumstances(device, dtype)
    dense = matrix.to_dense()
    plans = _plans(matrix, int8)
    packed = [(plan, *pack_for(matrix, plan.block_rows, plan.block_cols, plan.even)) for plan in plans]
    kernels = [("blocks",) if plan.even else ("compiled", "blocks") for plan in plans]  # of each plan
    small = not int8 and dense.nbytes <= MATRIX
    slack = 1.0 if small else 1.05  # a large matrix is kept beside its factors only for a clear gain
    ratios: list[list[tuple[float, str]]] = [[] for _ in packed]  # best (time over dense, kernel) per bucket
    for tokens in buckets:
        x = torch.randn(tokens, matrix.shape[1], device=device, dtype=dtype)
        calls: list[Callable[[], object]] = [lambda x=x: F.linear(x, dense)]  # type: ignore[misc]  # binds x
        for (_, layout, factors, lists), tried in zip(packed, kernels, strict=True):
            calls += [_call(x, factors, lists, layout, name) for name in tried]
        reference, *times = interleaved_medians(calls, device, SECONDS)
        left = iter(times)
        for per_bucket, tried in zip(ratios, kernels, strict=True):
            fastest = min((next(left) / reference, name) for name in tried)
            per_bucket.append(fastest if fastest[0] < slack else (1.0, "dense"))
    means = [math.exp(statistics.fmean(math.log(ratio) for ratio, _ in per_bucket)) for per_bucket in ratios]
    best = min(range(len(packed)), key=means.__getitem__)
    names = [name for _, name in ratios[best]]
    if "blocks" in names and "compiled" in kernels[best] and "compiled" not in names:
        names[names.index("blocks")] = "compiled"  # without it the weight would be packed evenly, unlike what was timed
    return replace(
        packed[best][0],
        kernels=tuple(zip(buckets, names, strict=True)),
        speedups=tuple((tokens, 1 / ratio) for tokens, (ratio, _) in zip(buckets, ratios[best], strict=True)),
        **facts,  # type: ignore[arg-type]  # keys are fields of Plan
    )


def _call(x: Tensor, factors: Tensor, lists: Tensor, layout: Layout, name: str) -> Callable[[], object]:
    return lambda: product.linear(x, factors, lists, layout, None, name)
