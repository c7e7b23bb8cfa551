"""Whether loading keeps up with training: images from JPEG files, tokens from a mapped file; ratios of one run.

python integration/benchmarks/loading.py --workers 1 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def seconds_of(use: Callable[[], object]) -> float:
    begin = time.perf_counter()
    use()
    return time.perf_counter() - begin


def measure(what: str, network: nn.Module, data: Dataset[Any], batch: int, workers: int, rounds: int) -> None:
    """Turn by turn: a step on one batch in memory, a step that first takes a batch from the workers, a batch loaded."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def train(pair: Any) -> None:
        logits = network(pair[0])
        F.cross_entropy(logits.flatten(0, -2), pair[1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def loader(count: int) -> Iterator[Any]:
        return endless(
            DataLoader(data, batch, shuffle=True, num_workers=count, drop_last=True, persistent_workers=count > 0)
        )

    by_workers, in_process = loader(workers), loader(0)
    one = next(by_workers)
    train(one)
    alone, fed, load = [], [], []
    for _ in range(rounds):
        alone.append(seconds_of(lambda: train(one)))
        fed.append(seconds_of(lambda: train(next(by_workers))))
        load.append(seconds_of(lambda: next(in_process)))
    step, full, loading = (statistics.median(times) for times in (alone, fed, load))
    print(
        f"{what}: one process loads {batch / loading:,.0f}/s, {step / loading:.1f} times what training takes "
        f"({batch / step:.1f}/s); fed step over step alone {full / step:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder, 64)
        task = ResNetTask(dataset="folder", folder=name, image_size=112)
        train, _ = image_folders(name, 112, imagenet=False)
        measure("ResNet-18 at 112 pixels, images", task.network(), train, 4, arguments.workers, arguments.rounds)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 4096, 10_000_000).astype(np.uint16))
        windows = Windows(TokenFile(folder / "tokens.npy"), 256, 256)
        gpt2 = GPT2Task(context=256, n_layer=2, n_embd=192, n_head=4, vocab_size=4096)
        measure(
            "small GPT-2 (2 layers of 192), windows of 256",
            gpt2.network(),
            windows,
            2,
            arguments.workers,
            arguments.rounds,
        )


if __name__ == "__main__":
    main()
