"""Check and time everything that runs on a CUDA device, in one call; needs torch and triton, nothing else.

    python integration/benchmarks/gpu.py [--json FILE] [--dtype bfloat16] [--relative-flops 0.25] [--tiny]

Checks values and gradients against float64, then times: products over cuBLAS's dense product, masks over their FFT
form, prox-and-clip over torch's operations, training steps (time and peak memory) over a dense layer's. The two sides
take turns, and every figure is a ratio of medians. Products are replayed from CUDA graphs, with the weights of several
layers in rotation so that neither side is served from a cache that a real model would not have.

``--tiny`` takes sizes of a few dozen; without a CUDA device it runs on the CPU in triton's interpreter
(TRITON_INTERPRET=1), to see that everything works. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gblr_plugin.kernels import compiled, product
from gblr_plugin.kernels.packing import pack
from gblr_plugin.kernels.plan import candidates
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.layers import masks as mask
from gblr_plugin.learning import proximal
from gblr_plugin.learning.goals import LayerGoal
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.learning.optimizers import param_groups
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIGMA = 100.0


def structure(m: int, n: int, share: float, align: int = 1, splits: int = 1) -> StructuredMatrix:
    """Mixed widths, uniform in (0, half the axis], at any place, cyclic."""
    g = torch.Generator().manual_seed(0)
    num = max(round(share * m * n / ((m // splits + n + 2 * align) / 4)), 1)

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, max(length // 2 // align, 1) + 1, (num,), generator=g) * align
        return Intervals(width, torch.randint(0, length // align, (num,), generator=g) * align, length)

    u, v = (torch.randn(num, size, generator=g) / num**0.5 for size in (m // splits, n))
    sizes = tuple(len(part) for part in torch.arange(num).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


class Bench:
    """A device, how to time on it, and the figures found so far."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.rows: list[dict[str, Any]] = []

    def medians(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each call, in turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(self.rounds):
            for name, call in calls.items():
                times[name].append(self._once(call))
        return {name: statistics.median(taken) for name, taken in times.items()}

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def graphed(self, calls: list[Callable[[], object]]) -> Callable[[], object]:
        """The calls one after another, in one CUDA graph where there are graphs."""
        if self.device.type == "cpu":
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls * 2:  # kernels are compiled and tuned before they are captured
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def allocated(self) -> int:
        """Bytes of all tensors on the device now (0 on the CPU)."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self, call: Callable[[], object], before: int) -> float:
        """Bytes allocated at most during a call, less ``before``; 1 on the CPU, where they are not counted."""
        if self.device.type == "cpu":
            return 1.0
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def row(self, section: str, what: str, base: float, ours: float, **more: Any) -> None:
        """Keep and print one line; times in milliseconds."""
        self.rows.append({"section": section, "what": what, "base_ms": base, "ours_ms": ours, **more})
        notes = "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in more.items()
        )
        print(f"{section:10}{what:44}{base:10.4f}{ours:10.4f}{base / ours:8.2f}x  {notes}", flush=True)


@contextlib.contextmanager
def torch_masks() -> Iterator[None]:
    """Masks by torch operations, without the kernels."""
    kernels = mask.mask_kernels
    mask.mask_kernels = lambda *arguments: None
    try:
        yield
    finally:
        mask.mask_kernels = kernels


@contextlib.contextmanager
def torch_proximal() -> Iterator[None]:
    """Prox-and-clip by torch operations, without the kernel."""
    kernel = proximal.proximal_kernel
    proximal.proximal_kernel = lambda parameters: None
    try:
        yield
    finally:
        proximal.proximal_kernel = kernel


# -- checks ------------------------------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor, tolerance: float, *what: object) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm())
    assert error < tolerance, (*what, error)


def check_products(device: torch.device, dtypes: list[torch.dtype], tiny: bool) -> None:
    """Every dtype and several odd shapes against the float64 product, with gradients, through the operator."""
    cases = [(57, 33, 1, 3), (48, 64, 16, 1)] if tiny else [(96, 160, 1, 1), (57, 33, 1, 3), (512, 768, 32, 1)]
    blocks = [(16, 16)] if tiny else [(16, 16), (64, 64), (33, 20), (128, 32)]
    for (m, n, align, splits), dtype in itertools.product(cases, dtypes):
        matrix = structure(m, n, 0.4, align, splits).to(device).to(dtype)
        dense = matrix.to_dense().double()
        for size, tokens in itertools.product(blocks, [3, 40] if tiny else [1, 3, 16, 70, 300]):
            layout, factors, lists = pack(matrix, *size)
            x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=True)
            bias = torch.randn(m, device=device, dtype=dtype)
            y = compiled.linear(x, factors, lists, layout, bias, opaque=False)
            close(y, x.double() @ dense.t() + bias, TOLERANCE[dtype], "product", m, n, dtype, size, tokens)
            (grad,) = torch.autograd.grad(y.float().sum(), x)
            close(grad, dense.sum(0).expand_as(grad), 3 * TOLERANCE[dtype], "product's gradient", m, n, dtype, size)


def check_training(device: torch.device, dtypes: list[torch.dtype], n: int) -> None:
    """Masked factors and their gradients, and prox-and-clip, against torch operations in float64."""
    for dtype in dtypes:
        tables = mask.mask_tables(n, SIGMA / 5, torch.float32, device)
        inputs = [torch.randn(n, n, device=device).to(dtype), *torch.rand(2, n, device=device)]
        inputs = [part.requires_grad_() for part in inputs]
        upstream = torch.randn(n, n, device=device).to(dtype)
        masked = mask.masked_factor(*inputs, tables)
        found = [masked, *torch.autograd.grad(masked, inputs, upstream)]
        exact = [inputs[0].detach().double(), *(part.detach() for part in inputs[1:])]
        exact = [part.requires_grad_() for part in exact]
        with torch_masks():
            masked = mask.masked_factor(*exact, mask.mask_tables(n, SIGMA / 5, torch.float64, device))
            expected = [masked, *torch.autograd.grad(masked, exact, upstream.double())]
        for a, b in zip(found, expected, strict=True):
            close(a, b, 3 * TOLERANCE[dtype], "mask", dtype)
    widths, locations = ([torch.randn(2, k, device=device) for k in (5, n)] for _ in range(2))
    copies = [part.clone() for part in (*widths, *locations)]
    thresholds = torch.tensor([0.1, -0.1], dtype=torch.float64, device=device)
    proximal.prox_and_clip_(widths, locations, thresholds)
    with torch_proximal():
        proximal.prox_and_clip_(copies[:2], copies[2:], thresholds)
    for a, b in zip((*widths, *locations), copies, strict=True):
        torch.testing.assert_close(a, b)


def check_graphs(bench: Bench, n: int, dtype: torch.dtype) -> None:
    """A captured product and a captured training step answer new inputs as the calls themselves do."""
    if bench.device.type == "cpu":
        print("CUDA graphs: no device")
        return
    matrix = structure(n, n, 0.3).to(bench.device).to(dtype)
    layout, factors, lists = pack(matrix, 32, 32)
    x, y = torch.randn(40, n, device=bench.device, dtype=dtype), torch.empty(40, n, device=bench.device, dtype=dtype)
    replay = bench.graphed([lambda: y.copy_(product.linear(x, factors, lists, layout, None, "compiled"))])
    x.normal_()
    replay()
    close(y, x.double() @ matrix.to_dense().double().t(), TOLERANCE[dtype], "captured product")
    layer = GBLRLinear(structure(n, n, 0.3)).to(bench.device)
    layer.set_sigma(SIGMA)
    inputs = torch.randn(40, n, device=bench.device)
    parameters = list(layer.parameters())

    def step() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        layer(inputs).square().sum().backward()

    replay = bench.graphed([step])
    inputs.normal_()
    replay()
    found = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
    step()
    for gradient, parameter in zip(found, parameters, strict=True):
        close(gradient, parameter.grad, 1e-4, "captured training step")
    print("CUDA graphs: a product and a training step, captured and replayed, agree")


# -- times -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def time_products(bench: Bench, matrix: StructuredMatrix, tokens: int, layers: int, align: int) -> None:
    """Dense (cuBLAS) and structured product per layer."""
    plan = candidates(matrix, kernel="compiled")[0]
    layout, factors, lists = pack(matrix, plan.block_rows, plan.block_cols)
    dense = matrix.to_dense()
    x = torch.randn(tokens, matrix.shape[1], device=dense.device, dtype=dense.dtype)

    def ours(values: Tensor) -> Callable[[], Tensor]:
        return lambda: compiled.linear(x, values, lists, layout, None, opaque=True)

    def theirs(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: F.linear(x, weight)

    sides = {
        "dense": bench.graphed([theirs(dense.clone()) for _ in range(layers)]),
        "ours": bench.graphed([ours(factors.clone()) for _ in range(layers)]),
    }
    found = bench.medians(sides)
    m, n = matrix.shape
    bench.row(
        "product",
        f"{m}x{n}, {tokens} tokens, align {align}",
        found["dense"] / layers,
        found["ours"] / layers,
        share=found["dense"] / found["ours"] * matrix.relative_flops,
        relative_flops=matrix.relative_flops,
        padding=layout.padding,
        blocks=f"{plan.block_rows}x{plan.block_cols}",
    )


def time_masks(bench: Bench, n: int) -> None:
    """Masked factor, forward and backward, K = n: the FFT form and torch's tables over the kernels."""
    device = bench.device
    tables = mask.mask_tables(n, SIGMA, device=device)
    inputs = [torch.randn(n, n, device=device), *torch.rand(2, n, device=device)]
    factor, width, location = (part.requires_grad_() for part in inputs)
    upstream = torch.randn(n, n, device=device)

    def through(value: Tensor) -> None:
        torch.autograd.grad(value, (factor, width, location), upstream)

    def by_torch() -> None:
        with torch_masks():
            through(mask.masked_factor(factor, width, location, tables))

    found = bench.medians(
        {
            "fft": lambda: through(mask.gaudi_mask(width, location, n, SIGMA, form="fft") * factor),
            "torch": by_torch,
            "ours": lambda: through(mask.masked_factor(factor, width, location, tables)),
        }
    )
    bench.row("masks", f"K = n = {n}, over the FFT form", found["fft"], found["ours"])
    bench.row("masks", f"K = n = {n}, over torch's tables", found["torch"], found["ours"])


def time_proximal(bench: Bench, layers: int, components: int) -> None:
    """Prox-and-clip over many layers: torch's operations over one launch."""
    device = bench.device
    widths, locations = ([torch.rand(2, components, device=device) for _ in range(layers)] for _ in range(2))
    thresholds = torch.zeros(layers, dtype=torch.float64, device=device)

    def by_torch() -> None:
        with torch_proximal():
            proximal.prox_and_clip_(widths, locations, thresholds)

    found = bench.medians({"torch": by_torch, "ours": lambda: proximal.prox_and_clip_(widths, locations, thresholds)})
    bench.row("prox", f"{layers} layers of {components} components", found["torch"], found["ours"])


def time_training(bench: Bench, m: int, n: int, tokens: int, share: float | None, dtype: torch.dtype) -> None:
    """A training step of a structured layer, all components live, over a dense layer's; ``share`` None: full widths."""
    k, device, before = min(m, n), bench.device, bench.allocated()
    g = torch.Generator().manual_seed(0)
    sides = []
    for length in (m, n):
        width = torch.full((k,), length)
        if share is not None:
            mean = share * m * n / k / (m + n) * length
            width = ((0.5 + torch.rand(k, generator=g)) * mean).round().long().clamp(1, length)
        sides.append(Intervals(width, torch.randint(0, length, (k,), generator=g), length))
    u, v = torch.randn(k, m, generator=g) / k**0.5, torch.randn(k, n, generator=g) / n**0.5
    layer = GBLRLinear(StructuredMatrix.from_factors(u, v, *sides), torch.zeros(m)).to(device)
    learner = StructureLearner({"layer": layer}, {"layer": LayerGoal(threshold=0.0)}, None)
    learner.begin()
    learner.set_progress(1.0)

    def stepping(module: nn.Module, after: Callable[[Any], None]) -> Callable[[], None]:
        groups = [group for group in param_groups(module, lr=1e-6, weight_decay=0.01) if group["params"]]
        optimizer = torch.optim.AdamW(groups, fused=True)
        inputs = torch.randn(tokens, n, device=device, requires_grad=True)
        upstream = torch.randn(tokens, m, device=device)

        def step() -> None:
            optimizer.zero_grad()
            inputs.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = module(inputs)
            y.backward(upstream.to(y.dtype))
            optimizer.step()
            after(optimizer)

        return step

    ours = stepping(layer, learner.after_step)
    peak, before = bench.peak(ours, before), bench.allocated()
    dense = stepping(nn.Linear(n, m, device=device), lambda optimizer: None)
    peak /= bench.peak(dense, before)
    found = bench.medians({"dense": dense, "ours": ours})
    named = "full widths" if share is None else f"{share:.0%} of FLOPs"
    bench.row(
        "training",
        f"{m}x{n}, {tokens} tokens, {named}",
        found["dense"],
        found["ours"],
        over_dense=found["ours"] / found["dense"],
        peak_memory_over_dense=peak,
    )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "3072x768"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 197, 4096])
    parser.add_argument("--align", nargs="+", type=int, default=[32, 1])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the timed products and training steps")
    parser.add_argument("--relative-flops", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=8, help="weights in rotation")
    parser.add_argument("--rounds", type=int, default=30, help="repetitions of which the median is taken")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small sizes; without CUDA in triton's interpreter")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    device, dtypes = torch.device("cuda"), list(DTYPES.values())
    name = "no CUDA device: triton's interpreter"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif options.tiny and os.environ.get("TRITON_INTERPRET") == "1":
        device, dtypes, options.dtype = torch.device("cpu"), [torch.float32], "float32"  # its bfloat16 is not right
        use_triton_on_the_cpu()
    else:
        sys.exit("no CUDA device; TRITON_INTERPRET=1 with --tiny runs everything small on the CPU")
    if options.tiny:
        options.shapes, options.tokens, options.align, options.layers, options.rounds = ["64x48"], [1, 20], [16], 1, 1
    dtype = DTYPES[options.dtype]
    bench = Bench(device, options.rounds)
    import triton

    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}, {options.dtype}")
    small = 40 if options.tiny else 768
    if not options.no_check:
        check_products(device, dtypes, options.tiny)
        check_training(device, dtypes, small)
        print("values and gradients agree with float64")
        check_graphs(bench, 40 if options.tiny else 512, dtype)
    print(f"\n{'':10}{'':44}{'base ms':>10}{'ours ms':>10}{'faster':>9}")
    for text, align in itertools.product(options.shapes, options.align):
        m, n = (int(part) for part in text.split("x"))
        matrix = structure(m, n, options.relative_flops, align).to(device).to(dtype)
        for tokens in options.tokens:
            time_products(bench, matrix, tokens, options.layers, align)
    for n in (small,) if options.tiny else (768, 4096):
        time_masks(bench, n)
    time_proximal(bench, *((3, 20) if options.tiny else (72, 768)))
    for m, n in ((48, small),) if options.tiny else ((768, 768), (3072, 768), (4096, 4096)):
        for tokens, share in itertools.product(
            *(((20,), (0.25,)) if options.tiny else ((256, 4096), (0.25, 1.0, None)))
        ):
            time_training(bench, m, n, tokens, share, dtype)
    if options.json:
        figures = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "dtype": options.dtype}
        text = json.dumps({**figures, "rows": bench.rows}, indent=1)
        Path(options.json).write_text(text, encoding="utf-8")


def use_triton_on_the_cpu() -> None:
    """Let the triton kernels serve tensors of the CPU, in the interpreter."""
    from gblr_plugin.kernels.cuda import triton_masks, triton_proximal
    from gblr_plugin.kernels.cuda import triton_product as triton_cuda

    compiled._kernel = lambda kind: triton_cuda.product
    mask.mask_kernels = lambda *arguments: triton_masks
    proximal.proximal_kernel = lambda parameters: triton_proximal.prox_and_clip


if __name__ == "__main__":
    main()
