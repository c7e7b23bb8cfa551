"""Check and time the structured product on a CUDA device, in one call; needs torch and triton, nothing else.

    python integration/benchmarks/cuda_products.py [--tokens 1 16 4096] [--shapes 4096x4096] [--dtype bfloat16]

Times are medians of CUDA graph replays, dense and structured in turns, with the weights of several layers in rotation
so that neither product is served from a cache that a real model would not have.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gblr_plugin.kernels import compiled, product
from gblr_plugin.kernels.layout import pack
from gblr_plugin.kernels.plan import candidates
from gblr_plugin.structure import Intervals, StructuredMatrix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def structure(m: int, n: int, share: float, align: int, splits: int = 1, seed: int = 0) -> StructuredMatrix:
    """Mixed widths, uniform in (0, half the axis], at any place, cyclic."""
    g = torch.Generator().manual_seed(seed)
    num = max(round(share * m * n / ((m // splits + n + 2 * align) / 4)), 1)

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length // 2 // align + 1, (num,), generator=g) * align
        return Intervals(width, torch.randint(0, length // align, (num,), generator=g) * align, length)

    u, v = (torch.randn(num, size, generator=g) / num**0.5 for size in (m // splits, n))
    sizes = tuple(len(part) for part in torch.arange(num).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


def check(device: torch.device) -> None:
    """Every dtype and several odd shapes against the float64 product, with gradients."""
    cases = [(96, 160, 1, 1), (57, 33, 1, 3), (512, 768, 32, 1), (768, 256, 1, 3), (301, 257, 1, 1)]
    for (m, n, align, splits), dtype in itertools.product(cases, DTYPES.values()):
        matrix = structure(m, n, 0.4, align, splits).to(device).to(dtype)
        dense = matrix.to_dense().double()
        for blocks, tokens in itertools.product([(16, 16), (64, 64), (33, 20), (128, 32)], [1, 3, 16, 70, 300]):
            layout, factors, lists = pack(matrix, *blocks)
            x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=True)
            bias = torch.randn(m, device=device, dtype=dtype)
            y = product.linear(x, factors, lists, layout, bias, "compiled")
            expected = x.double() @ dense.t() + bias
            error = float((y - expected).norm() / expected.norm())
            assert error < TOLERANCE[dtype], (m, n, dtype, blocks, tokens, error)
            (grad,) = torch.autograd.grad(y.float().sum(), x)
            expected_grad = dense.sum(0).expand_as(grad)
            error = float((grad - expected_grad).norm() / expected_grad.norm())
            assert error < 3 * TOLERANCE[dtype], (m, n, dtype, blocks, tokens, error, "gradient")
    print("values and gradients agree with float64:", ", ".join(DTYPES))


def graphed(calls: list[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """The calls one after another in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def medians(graphs: list[torch.cuda.CUDAGraph], rounds: int = 30) -> list[float]:
    """Median milliseconds per replay, in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, taken in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


@torch.no_grad()
def compare(matrix: StructuredMatrix, tokens: int, layers: int, tiles: Any, blocks: tuple[int, int] | None) -> None:
    """One line: dense and structured times per layer."""
    plan = candidates(matrix)[0]
    size = (plan.block_rows, plan.block_cols) if blocks is None else blocks
    layout, factors, lists = pack(matrix, *size)
    dense = matrix.to_dense()
    x = torch.randn(tokens, matrix.shape[1], device=dense.device, dtype=dense.dtype)
    weights = [dense.clone() for _ in range(layers)]
    buffers = [factors.clone() for _ in range(layers)]

    def ours(values: Tensor) -> Callable[[], Tensor]:
        if tiles is None:
            return lambda: product.linear(x, values, lists, layout, None, "compiled")
        return lambda: compiled.linear(x, values, lists, layout, None, opaque=True, tiles=tiles)

    def theirs(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: F.linear(x, weight)

    dense_ms, ours_ms = medians([graphed([theirs(w) for w in weights]), graphed([ours(v) for v in buffers])])
    ratio = dense_ms / ours_ms
    print(
        f"{matrix.shape[0]}x{matrix.shape[1]} tokens {tokens:5d} blocks {size} padding {layout.padding:.3f} "
        f"dense {dense_ms / layers * 1e3:8.1f} us  ours {ours_ms / layers * 1e3:8.1f} us  speed-up {ratio:.2f} "
        f"share {ratio * matrix.relative_flops:.2f} {tiles or ''}",
        flush=True,
    )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "3072x768"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--align", nargs="+", type=int, default=[32, 1])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--relative-flops", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=8, help="weights in rotation")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device), "torch", torch.__version__, options.dtype)
    if not options.no_check:
        check(device)
    for text, align in itertools.product(options.shapes, options.align):
        m, n = (int(part) for part in text.split("x"))
        matrix = structure(m, n, options.relative_flops, align).to(device).to(DTYPES[options.dtype])
        print(f"align {align}, {matrix.num_components} components, {matrix.relative_flops:.3f} of the FLOPs")
        for tokens in options.tokens:
            compare(matrix, tokens, options.layers, None, None)


if __name__ == "__main__":
    main()
