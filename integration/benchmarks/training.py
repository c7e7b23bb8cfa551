"""Time training steps of structured layers against dense ones, and masks against their FFT form.

Every figure is a ratio of medians of interleaved repetitions in one process, so that a busy machine slows both sides.
For training steps caches are swept before each call, as the other layers of a network would do: a lone dense layer and
its optimizer state would otherwise stay in the cache from step to step. ``--fused`` takes AdamW(fused=True) on both
sides. Peak memory is what torch's allocator holds at most during a step: parameters, gradients, optimizer state,
inputs, and everything in between, temporary memory inside operations included.

    python integration/benchmarks/training.py [--shapes 768x768] [--tokens 256 4096] [--threads 1] [--fused]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gblr_plugin import GBLRLinear, Intervals, LayerGoal, StructuredMatrix, StructureLearner
from gblr_plugin.layers.blockwise import _Side
from gblr_plugin.layers.masks import gaudi_mask, masked_factor, table_mask
from gblr_plugin.learning.optimizers import param_groups
from gblr_plugin.matrix.gaudi_mask import mask_tables

SIGMA = 100.0
clock: Callable[[], float] = time.perf_counter


def interleaved(functions: dict[str, Callable[[], object]], repetitions: int, *, swept: bool) -> dict[str, float]:
    """Median seconds of each function; one call of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    sweep = torch.zeros(16 << 20)  # 64 MiB
    for function in functions.values():
        function()
    for _ in range(repetitions):
        for name, function in functions.items():
            if swept:
                sweep.add_(1.0)
            begin = clock()
            function()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def layer_of(m: int, n: int, components: int, relative_flops: float | None) -> GBLRLinear:
    """A layer whose components are all live: widths spread around their mean, anywhere; ``None``: all full."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for length in (m, n):
        width = torch.full((components,), length)
        if relative_flops is not None:
            mean = relative_flops * m * n / components / (m + n)
            spread = 0.5 + torch.rand(components, generator=generator)
            width = (spread * mean * length).round().long().clamp(1, length)
        start = torch.randint(0, length, (components,), generator=generator)
        sides.append(Intervals(width, start if relative_flops is not None else torch.zeros_like(start), length))
    u = torch.randn(components, m, generator=generator) / components**0.5
    v = torch.randn(components, n, generator=generator) / n**0.5
    return GBLRLinear(StructuredMatrix.from_factors(u, v, *sides), torch.zeros(m))


def masks(n: int, repetitions: int) -> dict[str, float]:
    """Mask forward and backward at K = n, sigma 100: the FFT form over tables."""
    width, location = torch.rand(n, requires_grad=True), torch.rand(n, requires_grad=True)
    factor, upstream = torch.randn(n, n, requires_grad=True), torch.randn(n, n)
    tables = mask_tables(n, SIGMA)

    def through(mask: Tensor, *inputs: Tensor) -> None:
        torch.autograd.grad(mask, inputs, upstream)

    seconds = interleaved(
        {
            "fft": lambda: through(gaudi_mask(width, location, n, SIGMA, form="fft"), width, location),
            "tables": lambda: through(table_mask(width, location, tables), width, location),
            "fft_times_factor": lambda: through(
                gaudi_mask(width, location, n, SIGMA, form="fft") * factor, factor, width, location
            ),
            "masked_factor": lambda: through(masked_factor(factor, width, location, tables), factor, width, location),
        },
        repetitions,
        swept=False,
    )
    return {
        "fft_ms": 1e3 * seconds["fft"],
        "tables_ms": 1e3 * seconds["tables"],
        "fft_over_tables": seconds["fft"] / seconds["tables"],
        "fft_times_factor_over_masked_factor": seconds["fft_times_factor"] / seconds["masked_factor"],
    }


class Step:
    """One training step of a layer, whole and in parts."""

    fused = False

    def __init__(self, layer: nn.Module, tokens: int, m: int, n: int) -> None:
        self.layer = layer
        self.x, self.upstream = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
        groups = [group for group in param_groups(layer, lr=1e-6, weight_decay=0.01) if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=self.fused or None)

    def products(self) -> None:
        """Forward and backward, masks included."""
        self.optimizer.zero_grad()
        self.x.grad = None
        self.layer(self.x).backward(self.upstream)

    def masks(self) -> None:
        """Masks of both factors and all their gradients alone, on the blocks that the product takes."""
        assert isinstance(self.layer, GBLRLinear)
        product = self.layer._choose_product(len(self.x), linear=True)
        if product.rows is not None and product.cols is not None:
            for factor, axis in ((self.layer.U, product.rows), (self.layer.V, product.cols)):
                _Side(factor, axis, factor.dtype)
                side = _Side(factor, axis, factor.dtype)  # made again in the backward pass
                side.gradients(torch.empty(axis.size), with_edges=True)
            return
        u, v = self.layer.masked_factors()
        inputs = [p for p in (self.layer.U, self.layer.V, self.layer.widths, self.layer.locations) if p.requires_grad]
        torch.autograd.grad((u, v), inputs, (u.detach(), v.detach()))

    def step(self) -> None:
        """Forward, backward, optimizer (and prox, where a learner is attached)."""
        self.products()
        self.optimizer.step()

    def peak(self, after: Callable[[], object] | None = None) -> float:
        """MiB held at most during a step."""
        self.step()
        self.optimizer.zero_grad()
        self.x.grad = None
        kept = [self.x, self.upstream, *self.layer.parameters(), *self.layer.buffers()]
        kept += [part for state in self.optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
            if after is not None:
                after()
        running = most = sum(part.untyped_storage().nbytes() for part in kept)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            running += event.nbytes()
            most = max(most, running)
        return most / 2**20


def training(m: int, n: int, tokens: int, repetitions: int) -> list[dict[str, Any]]:
    """Step time of structured layers over the dense layer's, and where it goes."""
    dense = Step(nn.Linear(n, m), tokens, m, n)
    k = min(m, n)
    frozen = layer_of(m, n, k, 0.25)
    with torch.no_grad():  # three quarters of the components die, the others are four times as wide
        frozen.widths.mul_(4.0).clamp_(max=1.0)
        frozen.widths[:, k // 4 :] = 0.0
    frozen.freeze_structure()
    compacted = Step(frozen, tokens, m, n)
    compacted.step()
    frozen.compact([compacted.optimizer])
    cases = {
        "full widths": Step(layer_of(m, n, k, None), tokens, m, n),
        "all live, 100%": Step(layer_of(m, n, k, 1.0), tokens, m, n),
        "all live, 50%": Step(layer_of(m, n, k, 0.5), tokens, m, n),
        "all live, 25%": Step(layer_of(m, n, k, 0.25), tokens, m, n),
        "quarter live, compacted": compacted,
    }
    functions: dict[str, Callable[[], object]] = {"dense": dense.step, "dense products": dense.products}
    for name, case in cases.items():
        assert isinstance(case.layer, GBLRLinear)
        if not case.layer.structure_frozen:
            case.layer.set_sigma(SIGMA)
        cost = case.layer.relative_flops
        goal = LayerGoal(budget=cost) if cost <= 1 else LayerGoal(threshold=0.0)  # so that the structure stays as it is
        learner = StructureLearner({"layer": case.layer}, {"layer": goal}, None)
        functions[f"{name}: products"] = case.products
        functions[f"{name}: masks"] = case.masks
        functions[f"{name}: step"] = case.step
        functions[f"{name}: optimizer"] = case.optimizer.step  # once more, with the gradients of the step before
        if not case.layer.structure_frozen:
            learner.begin()
            learner.set_progress(1.0)
            functions[f"{name}: prox"] = lambda learner=learner, case=case: learner.after_step(case.optimizer)
    seconds = interleaved(functions, repetitions, swept=True)
    dense_peak = dense.peak()
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        assert isinstance(case.layer, GBLRLinear)
        part = {
            key: 1e3 * seconds.get(f"{name}: {key}", 0.0) for key in ("step", "products", "masks", "optimizer", "prox")
        }
        product = case.layer._choose_product(tokens, linear=True)
        rows.append(
            {
                "shape": f"{m}x{n}",
                "tokens": tokens,
                "structure": name,
                "relative_flops": round(case.layer.relative_flops, 3),
                "components": case.layer.U.shape[0],
                "product": ("blocks " if product.rows else "") + ("factored" if product.factored else "dense"),
                "dense_ms": 1e3 * seconds["dense"],
                "step_ms": part["step"] + part["prox"],
                "over_dense": (part["step"] + part["prox"]) / (1e3 * seconds["dense"]),
                "masks_ms": part["masks"],
                "products_ms": part["products"] - part["masks"],
                "optimizer_ms": part["optimizer"],
                "prox_ms": part["prox"],
                "peak_mib": case.peak(functions.get(f"{name}: prox")),
                "dense_peak_mib": dense_peak,
            }
        )
    return rows


def main() -> None:
    """Print the tables; write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["768x768", "3072x768"], help="of layers, rows x columns")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 4096], help="input vectors of a step")
    parser.add_argument("--masks", nargs="*", type=int, default=[768, 4096], help="lengths of masks, K = N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds in place of wall time: for a busy machine")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True), dense and structured")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Step.fused = options.fused
    if options.cpu_time:
        global clock
        clock = time.process_time
    found: dict[str, object] = {"torch": torch.__version__, "threads": options.threads}
    found["optimizer"] = "AdamW(fused=True)" if options.fused else "AdamW"
    if options.masks:
        print(f"{'masks':24}{'FFT ms':>9}{'tables ms':>11}{'ratio':>8}{'with factor':>13}")
    for n in options.masks:
        row = masks(n, options.repetitions if n < 1000 else 3)
        found[f"masks {n}"] = row
        print(
            f"K = n = {n:<16}{row['fft_ms']:9.1f}{row['tables_ms']:11.2f}{row['fft_over_tables']:8.1f}"
            f"{row['fft_times_factor_over_masked_factor']:13.1f}"
        )
    print(
        f"\n{'shape':10}{'tokens':>7}  {'structure':24}{'flops':>6}  {'product':16}{'/dense':>7}"
        f"{'memory':>8}{'dense':>8}{'masks':>7}{'prod.':>8}{'opt.':>7}{'prox':>6}  (ms)"
    )
    steps: list[dict[str, Any]] = []
    for m, n in (map(int, shape.split("x")) for shape in options.shapes):
        for tokens in options.tokens:
            for row in training(
                m, n, tokens, options.repetitions if tokens < 1000 else max(3, options.repetitions // 3)
            ):
                steps.append(row)
                memory = row["peak_mib"] / row["dense_peak_mib"]
                print(
                    f"{row['shape']:10}{row['tokens']:7d}  {row['structure']:24}{row['relative_flops']:6.2f}  "
                    f"{row['product']:16}{row['over_dense']:7.2f}{memory:8.2f}{row['dense_ms']:8.1f}{row['masks_ms']:7.2f}"
                    f"{row['products_ms']:8.1f}{row['optimizer_ms']:7.2f}{row['prox_ms']:6.2f}"
                )
    found["steps"] = steps
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
