"""Long runs: memory over 10,000 optimizer steps, 1,000,000 products and 1,000 files; time over 1,000 layers.

Run one part, or all: ``python integration/soak.py [train] [infer] [files] [layers] [--share 1.0]``.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.surgery.layer_settings import LayerSettings


def megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def curve(what: str, count: int, body: Callable[[], object]) -> None:
    """Call a function so often; print the resident memory at eleven moments."""
    body()
    begun, seen, points = time.monotonic(), [], 10
    for part in range(points + 1):
        if part:
            for _ in range(count // points):
                body()
        gc.collect()
        seen.append(megabytes())
    seconds = time.monotonic() - begun
    print(f"{what}: {count} in {seconds:.0f} s; MB resident: {' '.join(f'{value:.1f}' for value in seen)}")
    print(f"    from 20% on: {seen[-1] - seen[2]:+.1f} MB")


def train(share: float) -> None:
    """A whole course of learning, and the cool-down."""
    steps = int(10_000 * share)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    layers = gblr.prepare(model)
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-3))
    goals = {name: gblr.LayerGoal(budget=0.3, group=0) for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(steps // 20, steps * 4 // 5))
    learner.attach_all([optimizer])
    x = torch.randn(16, 32)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()

    curve("optimizer steps", steps, step)
    if not learner.frozen or learner.relative_flops > 0.3:
        raise SystemExit("the budget was not met")


def frozen(width: int = 32) -> nn.Module:
    """A small converted model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    return gblr.convert(model).eval()


def infer(share: float) -> None:
    """Products of one small layer."""
    model, x = frozen(), torch.randn(1, 32)
    with torch.inference_mode():
        curve("inference calls", int(1_000_000 * share), lambda: model(x))


def files(share: float) -> None:
    """Prepare, convert, save, load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"

        def cycle() -> None:
            gblr.save(frozen(), path)
            gblr.load(path, lambda: nn.Sequential(nn.Linear(32, 32)))

        curve("convert, save, load", int(1_000 * share), cycle)


def layers(share: float) -> None:
    """Wrap and convert models of more and more layers; time of the processor, so that other processes matter little."""
    frozen()
    for count in (125, 250, 500, 1000):
        count = max(1, int(count * share))
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
        begun = time.process_time()
        made = gblr.prepare(model)
        wrapped = time.process_time()
        for layer in made.values():
            layer.freeze_structure()
        gblr.convert(model, plan="fixed")
        done = time.process_time()
        per = [1e3 * seconds / count for seconds in (wrapped - begun, done - wrapped)]
        print(f"{count} layers: wrapped in {per[0]:.2f} ms a layer, converted in {per[1]:.2f} ms a layer")


PARTS = {part.__name__: part for part in (train, infer, files, layers)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.parts:
        PARTS[name](arguments.share)
