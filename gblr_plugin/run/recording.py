"""Records the figures of every network of a run, evaluated as trained and again after loading it from its file."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from ..serialization import load_into, save
from ..surgery.counting import report
from ..surgery.report import Report
from ..tasks.base import PairsDataModule
from .context import RunContext
from .measure import evaluate, interleaved_latency
from .trainer import device_of

__all__ = ["Records", "evaluate_both"]


def evaluate_both(
    network: nn.Module, data: PairsDataModule, context: RunContext
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a network on held-out data and on training data, on the device of the trainings."""
    device, most = device_of(context.settings.trainer), context.settings.evaluate_on
    held_out, train = (
        evaluate(network, data.sample(unseen, most), context.task.metric, device) for unseen in (True, False)
    )
    return held_out, train


class Records:
    """Figures by method over the seeds, and the networks of the first seed.

    Args:
        context: Context of the run.

    Attributes:
        figures: One table a seed, by name.
        networks: Networks of the first seed by name, loaded back from their files.
        reports: What their layers cost.
        histories: Curves of the first seed in which a method's structure was learned.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.figures: dict[str, list[dict[str, Any]]] = {}
        self.networks: dict[str, nn.Module] = {}
        self.reports: dict[str, Report] = {}
        self.histories: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def evaluate(
        self, network: nn.Module, data: PairsDataModule, start: float, seed: int
    ) -> tuple[dict[str, Any], nn.Module]:
        """Save a network; the network that its file gives back, which is what users get, and its figures.

        Args:
            network: Dense, or converted.
            data: Data of the seed.
            start: ``time.monotonic()`` when its training began.
            seed: Seed of the split.
        """
        task = self._context.task
        metric = task.metric
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save(network, path)
            reloaded = load_into(path, task.network)
            size = path.stat().st_size
        figures, train = evaluate_both(reloaded, data, self._context)
        counted = report(network, task.example_input())
        result = {
            "seed": seed,
            **figures,
            f"train_{metric}": train[metric],
            "relative_flops": counted.relative_flops,
            "model_relative_flops": counted.model_relative_flops,
            "multiply_adds": counted.multiply_adds,
            "parameters": counted.parameters,
            "file_bytes": size,
            "seconds": time.monotonic() - start,
        }
        return result, reloaded

    def add(self, name: str, result: dict[str, Any], network: nn.Module, history: dict[str, Any]) -> None:
        """Keep the figures of a seed, and say them on the console.

        Args:
            name: Name of the method.
            result: From :meth:`evaluate`.
            network: Kept if the seed is the first.
            history: Curves of its structure by name, (step, value) each; empty where none was learned.
        """
        if history:
            curves = {key: [(step, value) for step, value in points] for key, points in history.items()}
            self.histories.setdefault(name, curves)
        self.figures.setdefault(name, []).append(result)
        task = self._context.task
        if result["seed"] == self._context.settings.seeds[0]:
            self.networks[name] = network
            self.reports[name] = report(network, task.example_input())
        self._context.console.line(
            f"seed {result['seed']}  {name:<12} {task.metric} {result[task.metric]:.3f}  "
            f"rel. FLOPs {result['relative_flops']:.4f}  {result['seconds']:.0f} s"
        )

    def latency(self) -> dict[str, dict[str, float]]:
        """Milliseconds of a forward pass of each network by batch size."""
        found: dict[str, dict[str, float]] = {name: {} for name in self.networks}
        for batch in self._context.settings.latency_batch:
            self._context.console.progress(f"latency at batch {batch}")
            seconds = interleaved_latency(self.networks, self._context.task.example_input(batch))
            for name, value in seconds.items():
                found[name][str(batch)] = 1e3 * value
        return found
