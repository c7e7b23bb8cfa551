"""Error, components and seconds of every decomposition method on given weights, or on those of networks trained here.

    python integration/benchmarks/decompose.py [FILE.npy | FILE.safetensors ...] [--match GLOB] [--budgets 0.25 0.5]
        [--align 1 16] [--methods svd trapezoid gblr] [--threads 1] [--limit 4]

Without files, a small network is trained on scikit-learn's digits and its weights are used. An error is the relative
Frobenius error ||W - W_hat|| / ||W||; it means nothing without the number of components K and the alignment T beside
it.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gblr_plugin.decomposition import METHODS, decompose


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


def rows(weights: dict[str, Tensor], options: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """(name, shape, budget, T, method, error, K, relative FLOPs, seconds), one per decomposition."""
    for name, weight in weights.items():
        exact = weight.double()
        for budget in options.budgets:
            for align in options.align:
                for method in options.methods:
                    begin = time.perf_counter()
                    found = decompose(weight, budget, method=method, align=align, max_components=options.components)
                    seconds = time.perf_counter() - begin
                    error = float(torch.linalg.norm(exact - found.to_dense().double()) / torch.linalg.norm(exact))
                    shape = "x".join(map(str, weight.shape))
                    yield name, shape, budget, align, method, error, found.num_components, found.relative_flops, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--match", default="*", help="glob over tensor names in a safetensors file")
    parser.add_argument("--limit", type=int, default=4, help="largest number of weights")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--align", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["svd", "trapezoid", "gblr"])
    parser.add_argument("--components", type=int, default=None, help="largest K; default min(m, n)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights: dict[str, Tensor] = {}
    for path in options.files:
        weights |= file_weights(path, options.match)
    if not options.files:
        weights = digits_weights()
    weights = dict(list(weights.items())[: options.limit])
    print(
        f"{'weight':40} {'shape':>10} {'budget':>6} {'T':>3} {'method':>10} {'error':>7} {'K':>5} {'FLOPs':>6} {'s':>7}"
    )
    for name, shape, budget, align, method, error, count, flops, seconds in rows(weights, options):
        print(
            f"{str(name)[-40:]:40} {shape:>10} {budget:6.2f} {align:3d} {method:>10} {error:7.4f} {count:5d} "
            f"{flops:6.4f} {seconds:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
