"""The numbers of the cost model, measured once per processor, dtype, kernel and number of threads.

The first conversion on a machine times a few dense and structured products, and writes the costs to the user's cache
folder: ``gblr_plugin`` in ``XDG_CACHE_HOME``, which is ``~/.cache`` by default. With ``GBLR_FIT_COSTS=0`` in the
environment nothing is measured, and the recorded costs are used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..matrix.structure import Intervals, StructuredMatrix
from ..utils.files import write_text
from ..utils.progress import track
from ..utils.timing import interleaved_medians
from .costs import BUCKETS, CASES, PLACES, Costs, Workload, case_of, recorded
from .measure import circumstances
from .plan import Plan, candidates, workload_of

__all__ = ["Make", "costs_here"]

SECONDS = 1.5  # after this time no further pass begins
PATIENCE = 60.0  # seconds to wait for another process that measures
# Microseconds of a dense product: above the first it is timed in one round, above the second no more tokens are tried.
SLOW, SLOWEST = 1000.0, 3000.0
ROUNDS = 3  # timings of each shorter product in one pass
PASSES = 12  # most passes over all short products, so that a disturbance of one pass does not reach all
# Shapes of the weights of linear layers and convolutions; (relative FLOPs, tile) of the structures of each.
SHAPES: tuple[tuple[int, ...], ...] = (
    *((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 256), (256, 1024), (1024, 1024), (2048, 2048)),
    *((32, 32, 1, 1), (64, 64, 1, 1), (128, 128, 1, 1), (256, 256, 1, 1), (512, 512, 1, 1)),
    *((16, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3), (128, 128, 3, 3), (256, 256, 3, 3)),
)
STRUCTURES = ((0.15, 1), (0.15, 32), (0.5, 1))

Make = Callable[[StructuredMatrix, tuple[int, ...], Plan], Tensor]
"""Makes the weight that a module holds from a matrix, the shape of the weight and a plan."""

_logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_known: dict[tuple[object, ...], Costs] = {}


class _Cell:
    """One shape in one case: a dense layer and structured ones, with their least times so far in microseconds."""

    def __init__(self, case: str, entries: int, layers: list[nn.Module], x: Tensor, features: list[tuple[float, ...]]):
        self.case, self.entries, self.features = case, entries, features
        self.calls = [partial(layer, x) for layer in layers]
        self.times = [math.inf] * len(layers)

    def take(self, clock: Callable[[], float], rounds: int = ROUNDS) -> None:
        """Time each structured layer in turns with the dense layer, and keep the least time of each.

        Only two layers take turns, since the weights of more would drive the dense weight out of the caches. The least
        time is the one that other work on the machine disturbed least.
        """
        dense, *others = self.calls
        for number, call in enumerate(others, 1):
            times = interleaved_medians([dense, call], _CPU, 0.0, rounds, clock, min)
            for at, taken in zip((0, number), times, strict=True):
                self.times[at] = min(self.times[at], 1e6 * taken)


def costs_here(device: torch.device, dtype: torch.dtype, kernel: str, make: Make) -> Costs:
    """Costs on this machine, from this process's memory, from the file, or from a measurement of up to two seconds.

    Processes wait for one another, so that only one of them measures. If the file cannot be read or written, a warning
    in the log names it, and the costs are measured again.

    Args:
        device: Only CPUs are measured; other devices take the recorded costs.
        dtype: Dtype of factors and inputs.
        kernel: ``"compiled"`` or ``"blocks"``.
        make: Makes the weights to time.
    """
    if device.type != "cpu" or os.environ.get("GBLR_FIT_COSTS", "1") == "0":
        return recorded(device, dtype, kernel)
    facts = _facts(device, dtype, kernel)
    key = tuple(facts.values())
    if key not in _known:
        _known[key] = _kept_or_fitted(facts, lambda: _fitted_apart(dtype, kernel, make))
    return _known[key]


def _facts(device: torch.device, dtype: torch.dtype, kernel: str) -> dict[str, str | int]:
    """The facts that a measurement depends on; costs from a file are used only if all of them are equal."""
    compiler = ""
    if kernel == "compiled":
        from .cpu.compile_cache import identity  # needs numba

        compiler = identity()
    return {**circumstances(device, dtype), "kernel": kernel, "torch": torch.__version__, "compiler": compiler}


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gblr_plugin"


def _kept_or_fitted(facts: dict[str, str | int], fit: Callable[[], Costs]) -> Costs:
    """The costs that the file holds for these facts; if it holds none, the costs from ``fit``, which it then keeps."""
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name, costs = f"costs-{facts['dtype']}-{facts['kernel']}-{facts['threads']}-{digest}.json", None
    try:
        path = _folder() / name
        costs = _read(path)
        if costs is not None:
            return costs
        import filelock  # takes a while to import

        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=PATIENCE):
            costs = _read(path, damaged="measured anew") or fit()
            write_text(path, json.dumps({**facts, **costs.to_dict()}, indent=1))
    except (OSError, RuntimeError) as error:  # the folder, its disk or the lock failed, or there is no home
        _logger.warning("costs of products are measured and not kept: %s", error)
    return fit() if costs is None else costs


def _read(path: Path, damaged: str | None = None) -> Costs | None:
    try:
        return Costs.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if damaged is not None:
            _logger.warning("costs of products: %s is damaged (%s) and %s", path, error, damaged)
    return None


def _fitted_apart(dtype: torch.dtype, kernel: str, make: Make) -> Costs:
    """Measure in another thread, where the caller's torch modes, autocast and default device do not apply."""
    with ThreadPoolExecutor(1, thread_name_prefix="gblr") as pool:
        return pool.submit(copy_context().run, _fitted, dtype, kernel, make).result()


@torch.no_grad()
def _fitted(dtype: torch.dtype, kernel: str, make: Make) -> Costs:
    cells = _measured(dtype, kernel, make)
    dense, ours = {}, {}
    for case in CASES:
        of_case = [cell for cell in cells if cell.case == case]
        fastest: dict[int, float] = {}
        for cell in of_case:
            fastest[cell.entries] = min(cell.times[0], fastest.get(cell.entries, math.inf))
        dense[case] = tuple(sorted(fastest.items()))
        pairs = [pair for cell in of_case for pair in zip(cell.features, cell.times[1:], strict=True)]
        ours[case] = _coefficients(pairs)
    return Costs(torch.get_num_threads(), dense, ours)


def _coefficients(found: list[tuple[tuple[float, ...], float]]) -> tuple[float, ...]:
    """What one unit of each feature adds to the time (>= 0), by least squares of relative errors.

    Args:
        found: (features, time) of every structured product.
    """
    wanted = np.array([row for row, _ in found]) / np.array([[time] for _, time in found])
    used = list(range(wanted.shape[1]))
    while True:
        solution = np.linalg.lstsq(wanted[:, used], np.ones(len(found)), rcond=None)[0]
        shares = solution * np.linalg.norm(wanted[:, used], axis=0)
        if shares.min() >= 0 or len(used) == 1:
            break
        used.pop(int(shares.argmin()))
    result = np.zeros(wanted.shape[1])
    result[used] = solution.clip(min=0)
    return tuple(result.tolist())


def _measured(dtype: torch.dtype, kernel: str, make: Make) -> list[_Cell]:
    """Time frozen modules as conversion makes them: all of them once, then the short products in further passes."""
    threads = torch.get_num_threads()
    # Other work on the machine does not disturb the time of a single thread, where the system counts that exactly.
    exact = threads == 1 and time.get_clock_info("thread_time").resolution <= 1e-6
    clock = time.thread_time if exact else time.perf_counter
    _layers(SHAPES[0], dtype, kernel, make)[0][-1](_inputs(SHAPES[0], dtype)[0][1])  # compiles the kernel, or loads it
    end, cells = clock() + SECONDS, []
    for shape in track(SHAPES, "timing products on this machine"):
        (layers, stored), slow = _layers(shape, dtype, kernel, make), False
        for case, x in _inputs(shape, dtype):
            tokens = PLACES**2 if len(shape) > 2 else len(x)
            cells.append(_Cell(case, prod(shape), layers, x, [each.features(tokens, threads) for each in stored]))
            cells[-1].take(clock, 1 if slow else ROUNDS)
            slow = cells[-1].times[0] > SLOW
            if cells[-1].times[0] > SLOWEST:
                break
    short = [cell for cell in cells if sum(cell.times) < SLOW]
    for _ in range(PASSES):
        for cell in short:
            if clock() > end:
                return cells
            cell.take(clock)
    return cells


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The cases of a weight of this shape, each with an input."""
    if len(shape) > 2:
        return [(case_of(prod(shape[2:]), 0), torch.ones(1, shape[1], PLACES, PLACES, dtype=dtype))]
    return [(case_of(None, tokens), torch.ones(tokens, shape[1], dtype=dtype)) for tokens in BUCKETS]


def _module(weight: Tensor) -> nn.Module:
    m, n = weight.shape[:2]
    module: nn.Linear | nn.Conv2d
    if weight.dim() > 2:
        module = nn.Conv2d(n, m, weight.shape[2], padding=weight.shape[2] // 2, device="meta")
    else:
        module = nn.Linear(n, m, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(torch.zeros(m, dtype=weight.dtype), requires_grad=False)
    return module


def _layers(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: str, make: Make
) -> tuple[list[nn.Module], list[Workload]]:
    """A dense layer, structured ones, and the workload of each of these."""
    m, n, taps = shape[0], prod(shape[1:]), prod(shape[2:]) if len(shape) > 2 else None
    layers, found = [_module(torch.full(shape, 0.5, dtype=dtype))], []
    for share, tile in STRUCTURES:
        if tile > min(m, n) // 2:
            continue
        matrix = _structure(m, n, share, tile, dtype)
        plan = candidates(matrix, taps, kernel)[0]
        layers.append(_module(make(matrix, shape, plan)))
        found.append(workload_of(plan, matrix, taps))
    return layers, found


def _structure(m: int, n: int, share: float, tile: int, dtype: torch.dtype) -> StructuredMatrix:
    """Components on intervals of complete tiles, up to half an axis wide, spread over the axis deterministically."""
    number = torch.arange(max(round(share * 4 * m * n / (m + n)), 1), dtype=torch.float64)

    def intervals(length: int, step: float) -> Intervals:
        steps = length // tile
        width = (number * step % 1 * (steps // 2)).long() + 1
        return Intervals(width * tile, (number * (step + 0.1) % 1 * steps).long() * tile, length)

    u, v = (torch.full((len(number), size), 0.5, dtype=dtype) for size in (m, n))
    return StructuredMatrix.from_factors(u, v, intervals(m, 0.618), intervals(n, 0.755))
