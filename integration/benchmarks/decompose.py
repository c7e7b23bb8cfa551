"""Error, components and seconds of every decomposition method on given weights, or on those of networks trained here.

    python integration/benchmarks/decompose.py [FILE.npy | FILE.safetensors ...] [--match GLOB] [--budgets 0.25 0.5]
        [--align 1 16] [--methods svd trapezoid gblr] [--threads 1] [--limit 4] [--tokens 256] [--figure FILE.png]

Without files, a small network is trained on scikit-learn's digits and its weights are used. An error is the relative
Frobenius error ||W - W_hat|| / ||W||; it means nothing without the number of components K and the alignment T beside
it. The measured time of a product with so many tokens over that of the dense weight (medians of interleaved runs)
stands beside the multiply-adds, and the figure draws the errors over both. The method `interval` is the published
initialiser, which the package itself does not use.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from published_initialiser import published
from torch import Tensor, nn

from gblr_plugin.decomposition import METHODS, decompose
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.tensor.gblr_tensor import GBLRTensor

HEADER = ("weight", "shape", "budget", "T", "method", "error", "K", "FLOPs", "latency", "s")


def digits_weights(steps: int = 600) -> dict[str, Tensor]:
    """Weights of a three-layer network after training on 8 x 8 digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(steps):
        index = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"digits.{name}": p.detach() for name, p in model.named_parameters() if p.dim() == 2 and min(p.shape) > 10}


def file_weights(path: Path, match: str) -> dict[str, Tensor]:
    """2-d floating-point tensors of a file whose names match."""
    if path.suffix == ".npy":
        import numpy as np

        return {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
    from safetensors.torch import load_file

    return {
        name: value
        for name, value in load_file(path).items()
        if value.dim() == 2 and value.is_floating_point() and fnmatch.fnmatch(name, match)
    }


@torch.no_grad()
def relative_latency(found: StructuredMatrix, weight: Tensor, tokens: int, repeats: int = 41) -> float:
    """Median time of a product over that of the dense weight, the two measured in turns."""
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype)
    packed = GBLRTensor.from_structured(found)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for each, kept in zip((packed, weight), seconds, strict=True):
            begin = time.perf_counter()
            nn.functional.linear(x, each)
            kept.append(time.perf_counter() - begin)
    # The first calls plan, compile and warm the caches.
    structured, dense = (statistics.median(kept[5:]) for kept in seconds)
    return structured / dense


def draw(results: list[tuple[object, ...]], path: Path) -> None:
    """Mean error over the weights, over multiply-adds and over measured time; a line per method and tile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines: dict[tuple[object, object], dict[object, list[tuple[float, float, float]]]] = {}
    for _, _, budget, align, method, error, _, flops, latency, _ in results:
        points = lines.setdefault((method, align), {}).setdefault(budget, [])
        points.append((float(str(flops)), float(str(latency)), float(str(error))))
    for (method, align), budgets in lines.items():
        means = [[statistics.mean(column) for column in zip(*points, strict=True)] for points in budgets.values()]
        for axis, at in ((left, 0), (right, 1)):
            axis.plot([m[at] for m in means], [m[2] for m in means], marker="o", label=f"{method}, T = {align}")
    left.set(xlabel="multiply-adds over dense", ylabel="relative Frobenius error", ylim=(0, None))
    right.set(xlabel="measured time over dense")
    right.axvline(1, color="grey", linewidth=0.8)
    left.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def rows(weights: dict[str, Tensor], options: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """What `HEADER` names, one per decomposition."""
    for name, weight in weights.items():
        exact = weight.double()
        for budget in options.budgets:
            for align in options.align:
                for method in options.methods:
                    begin = time.perf_counter()
                    solve = published if method == "interval" else partial(decompose, method=method)
                    found = solve(weight, budget, align=align, max_components=options.components)
                    seconds = time.perf_counter() - begin
                    error = float(torch.linalg.norm(exact - found.to_dense().double()) / torch.linalg.norm(exact))
                    shape = "x".join(map(str, weight.shape))
                    latency = relative_latency(found, weight, options.tokens)
                    count, flops = found.num_components, found.relative_flops
                    yield name, shape, budget, align, method, error, count, flops, latency, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--match", default="*", help="glob over tensor names in a safetensors file")
    parser.add_argument("--limit", type=int, default=4, help="largest number of weights")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--align", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "interval"], default=["svd", "trapezoid", "gblr"])
    parser.add_argument("--components", type=int, default=None, help="largest K; default min(m, n)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="rows of the input whose product is timed")
    parser.add_argument("--figure", type=Path, default=None, help="draw error over multiply-adds and over time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights: dict[str, Tensor] = {}
    for path in options.files:
        weights |= file_weights(path, options.match)
    if not options.files:
        weights = digits_weights()
    weights = dict(list(weights.items())[: options.limit])
    print(
        "{:40} {:>10} {:>6} {:>3} {:>10} {:>7} {:>5} {:>6} {:>7} {:>7}".format(*HEADER),
    )
    results = []
    for row in rows(weights, options):
        name, shape, budget, align, method, error, count, flops, latency, seconds = row
        results.append(row)
        print(
            f"{str(name)[-40:]:40} {shape:>10} {budget:6.2f} {align:3d} {method:>10} {error:7.4f} {count:5d} "
            f"{flops:6.4f} {latency:7.2f} {seconds:7.2f}",
            flush=True,
        )
    if options.figure is not None:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
