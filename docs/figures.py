"""Make the figures of the documents, with the package's own plots; about a minute on one quiet core.

    python docs/figures.py [--only masks trapezoid pursuit learning]

Needs matplotlib. Everything is seeded, so that the same versions draw the same figures on one machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

import gblr_plugin as gblr
from gblr_plugin.run.settings import Training
from gblr_plugin.tasks import get_task

IMAGES = Path(__file__).parent / "images"
EPOCHS, BATCH, BUDGET = 30, 64, 0.25
PLANTED = ((4, 8, 40, 28, 2), (30, 50, 50, 40, 3), (70, 0, 20, 60, 2), (0, 80, 30, 16, 2))  # top, left, size, rank


def save(figure: Figure, name: str) -> None:
    """Write a figure as a small PNG, without the version of matplotlib in it."""
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})


def masks() -> None:
    """One mask at growing sigma, and its derivative in the width."""
    n, samples = 128, torch.arange(128).numpy()
    figure = Figure(figsize=(7.2, 2.4), facecolor="white", layout="constrained")
    shapes, slopes = figure.subplots(1, 2, sharex=True)
    for sigma, colour in ((1.0, "#c9d3ec"), (4.0, "#8ea4d8"), (16.0, "#5473bd"), (100.0, "#22252b")):
        width, location = torch.tensor([0.3]), torch.tensor([0.25])
        shapes.plot(samples, gblr.gaudi_mask(width, location, n, sigma)[0].numpy(), color=colour, label=f"{sigma:g}")
        if sigma < 100:
            # The published formula at a real-valued width: the table rounds it.
            slope = torch.autograd.functional.jacobian(
                lambda w, at=location, s=sigma: gblr.gaudi_mask(w, at, n, s, straight_through=False, form="fft")[0],
                width,
            )[:, 0]
            slopes.plot(samples, slope.numpy(), color=colour)
    shapes.legend(title="sigma", fontsize=7, title_fontsize=7, frameon=False, loc="upper right")
    shapes.set_title("mask of width 0.3 at 0.25, N = 128", loc="left", fontsize=9)
    slopes.set_title("its derivative in the width", loc="left", fontsize=9)
    for axes in (shapes, slopes):
        axes.set_xlim(0, n - 1)
        axes.set_xlabel("sample", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, "masks")


def trapezoid() -> None:
    """Rank 16 as two trapezoids: the intervals that a low-rank matrix needs."""
    torch.manual_seed(0)
    low_rank = torch.randn(64, 16) @ torch.randn(16, 48)
    exact = (16 * (64 + 48) - 16 * 15) / (64 * 48)
    save(gblr.plot.structure(gblr.decompose(low_rank, exact, method="trapezoid")), "trapezoid")


def pursuit() -> None:
    """A matrix of four planted blocks, found again."""
    torch.manual_seed(0)
    weight = torch.zeros(96, 96)
    for top, left, height, width, rank in PLANTED:
        block = torch.randn(height, rank) @ torch.randn(rank, width)
        weight[top : top + height, left : left + width] += block
    found = gblr.decompose(weight, 0.08)
    error = float((weight - found.to_dense()).norm() / weight.norm())
    save(
        gblr.plot.structure(found, title=f"four planted blocks, found with a relative error of {error:.3f}"), "pursuit"
    )


def learning() -> None:
    """A vision transformer on handwritten digits, its structure learned while it trains from scratch."""
    pl.seed_everything(0, verbose=False)
    task = get_task("digits_vit")(patch_size=2, dim=64, depth=3, heads=4, mlp_ratio=2)
    data = task.data(seed=0, batch_size=BATCH)
    steps = EPOCHS * (len(data.train_set) // BATCH)
    module = task.module(task.network(), Training(epochs=EPOCHS, lr=2e-3), steps)
    callback = gblr.lightning.GBLRCallback(
        BUDGET, layers=["network.blocks.*"], row_splits={"*qkv": 3}, cooldown=0.7, log_every_n_steps=5
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    save(gblr.plot.curves(callback, budget=BUDGET), "learning")
    save(gblr.plot.structure(module.network), "layers")
    save(gblr.plot.structure(module.network.blocks[1].fc1), "one-layer")


FIGURES = {function.__name__: function for function in (masks, trapezoid, pursuit, learning)}


def main() -> None:
    """Draw all figures, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        FIGURES[name]()


if __name__ == "__main__":
    main()
