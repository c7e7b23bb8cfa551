"""Whether loading keeps up with training: images from JPEG files, tokens from a mapped file; ratios of one run.

python integration/benchmarks/loading.py --workers 1 --seconds 6
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gblr_plugin.data.images import image_folders
from gblr_plugin.data.text import TokenFile, Windows
from gblr_plugin.tasks.images import ResNetTask
from gblr_plugin.tasks.language import GPT2Task

Batches = Iterable[Any]


def photographs(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's usual size, 500 x 375, about as large as its files."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count // 2 if part == "train" else 1):
                coarse = generator.integers(0, 256, (24, 32, 3), np.uint8)
                picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
                noise = generator.normal(0, 8, (375, 500, 3))
                pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.jpg", quality=90)


def endless(loader: DataLoader[Any]) -> Batches:
    while True:
        yield from loader


def rate(batches: Batches, seconds: float, use: Callable[[Any], object]) -> float:
    """Examples a second."""
    iterator = iter(batches)
    use(next(iterator))  # workers start
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        batch = next(iterator)
        use(batch)
        count += len(batch[0])
    return count / (time.perf_counter() - begin)


def measure(what: str, network: nn.Module, data: Dataset[Any], batch: int, workers: int, seconds: float) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def train(batch: Any) -> None:
        logits = network(batch[0])
        F.cross_entropy(logits.flatten(0, -2), batch[1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def loader(count: int) -> Batches:
        return endless(
            DataLoader(data, batch, shuffle=True, num_workers=count, drop_last=True, persistent_workers=count > 0)
        )

    one = next(iter(loader(0)))
    loading = rate(loader(0), seconds / 2, lambda batch: None)
    alone = rate(itertools.repeat(one), seconds, train)
    fed = rate(loader(workers), seconds, train)
    print(
        f"{what}: one process loads {loading:,.1f}/s; training alone {alone:.2f}/s, fed {fed:.2f}/s: {fed / alone:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder, 64)
        task = ResNetTask(dataset="folder", folder=name)
        train, _ = image_folders(name, 224, imagenet=False)
        measure("ResNet-18, images", task.network(), train, 8, arguments.workers, arguments.seconds)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 50257, 10_000_000).astype(np.uint16))
        windows = Windows(TokenFile(folder / "tokens.npy"), 256, 256)
        gpt2 = GPT2Task(context=256, n_layer=2)
        measure("GPT-2 of 2 layers, windows of 256", gpt2.network(), windows, 2, arguments.workers, arguments.seconds)


if __name__ == "__main__":
    main()
