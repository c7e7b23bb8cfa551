"""Lambda and relative FLOPs over the steps: budgets from 5% to 90%, several learning rates, AdamW and SGD.

    python integration/benchmarks/lambda_traces.py [--steps 400] [--png docs/images/lambda-traces.png]

A three-layer network on scikit-learn's digits, its two large layers pooled under one budget and learned from a full
SVD, as published. Of every run it prints where it ends and how steady lambda is: the spread over its mean of lambda
over the last tenth of the ramp, and the most that relative FLOPs miss their ramp from above.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import gblr_plugin as gblr

BUDGETS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
OPTIMIZERS = {"AdamW": (torch.optim.AdamW, (3e-4, 1e-3, 3e-3)), "SGD": (torch.optim.SGD, (3e-3, 1e-2, 3e-2))}
SHADES = ("#c2410c", "#d97706", "#65a30d", "#0d9488", "#2563eb", "#6d28d9")

Trace = dict[str, list[float]]


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and held-out images and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def dense_network(x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """Trained for 300 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(300):
        pick = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    return model


def trace(kind: type[torch.optim.Optimizer], rate: float, budget: float, steps: int, data: tuple) -> Trace:
    """One run: warm-up for a twentieth, structure frozen for the last quarter."""
    x, y, test_x, test_y = data
    model = dense_network(x, y)
    layers = gblr.prepare(model, ["0", "2"])
    goals = dict.fromkeys(layers, gblr.LayerGoal(budget=budget, group="all"))
    schedule = gblr.Schedule(steps // 20, steps * 3 // 4)
    learner = gblr.StructureLearner(layers, goals, schedule)
    options = {"weight_decay": 0.05} if kind is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = kind(gblr.param_groups(model, lr=rate, **options))
    learner.attach_all([optimizer])
    found: Trace = {"lambda": [], "flops": [], "ramp": []}
    torch.manual_seed(1)
    start = learner.relative_flops
    for _ in range(steps):
        pick = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
        found["lambda"].append(max(learner.lambdas().values()))
        found["flops"].append(learner.relative_flops)
        found["ramp"].append(start + (budget - start) * schedule.ramp(learner.progress))
    with torch.no_grad():
        found["accuracy"] = [float((model(test_x).argmax(1) == test_y).float().mean())]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--png", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    begin, end = options.steps // 20, options.steps * 3 // 4
    late = slice(end - (end - begin) // 10, end - 1)
    columns = [(name, kind, rate) for name, (kind, rates) in OPTIMIZERS.items() for rate in rates]
    figure = Figure(figsize=(11, 4.4), facecolor="white", layout="constrained")
    panels = figure.subplots(2, len(columns), sharex=True, sharey="row")
    print(
        f"{'optimizer':9} {'rate':>7} {'budget':>6} {'reached':>8} {'lambda':>9} {'spread':>7} {'over':>7} {'acc.':>6}"
    )
    for column, (name, kind, rate) in enumerate(columns):
        top, bottom = panels[:, column]
        for budget, shade in zip(BUDGETS, SHADES, strict=True):
            found = trace(kind, rate, budget, options.steps, data)
            values = torch.tensor(found["lambda"][late])
            over = max(f - r for f, r in zip(found["flops"][begin:], found["ramp"][begin:], strict=True))
            print(
                f"{name:9} {rate:7.0e} {budget:6.2f} {found['flops'][-1]:8.4f} {float(values.mean()):9.3f} "
                f"{float(values.std() / values.mean().clamp(min=1e-12)):7.2f} {over:7.4f} {found['accuracy'][0]:6.3f}",
                flush=True,
            )
            shown = [value if value > 0 else float("nan") for value in found["lambda"]]
            top.plot(shown, color=shade, linewidth=0.8)
            bottom.plot(found["flops"], color=shade, linewidth=1.2, label=f"{budget:.0%}")
        top.set_yscale("log")
        top.set_title(f"{name}, rate {rate:g}", loc="left", fontsize=9)
        bottom.set_xlabel("step", fontsize=8)
        for axes in (top, bottom):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("lambda", fontsize=8)
    panels[1, 0].set_ylabel("relative FLOPs", fontsize=8)
    panels[1, -1].legend(title="budget", fontsize=7, title_fontsize=7, frameon=False, loc="upper right")
    if options.png is not None:
        figure.savefig(options.png, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
