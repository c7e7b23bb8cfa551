"""``gblr run --trial``: a run as one trial of an NNI experiment."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import nni
import pytorch_lightning as pl
import torch

from ..errors import GBLRError
from ..surgery.counting import report
from ..utils.console import Console
from ..utils.files import write_text
from .context import DENSE
from .measure import evaluate
from .pipeline import prepare_run
from .search_service import PARAMETERS
from .settings import RunSettings
from .summary import RunReport

__all__ = ["Trial", "next_parameters"]


def next_parameters(output: Path | None) -> tuple[dict[str, Any], Path]:
    """The values that NNI's tuner chose for this trial, also written down, and the folder of the trial.

    Outside an experiment there are none.

    Args:
        output: Folder in which the trial makes a folder named by its number; default NNI's folder for the trial.
    """
    if os.environ.get("NNI_PLATFORM") is None:
        return {}, output or Path("outputs") / "trial"
    parameters = dict(nni.get_next_parameter() or {})
    number = f"{nni.get_sequence_id():03d}"
    folder = Path(os.environ["NNI_OUTPUT_DIR"]) / "run" if output is None else output / number
    write_text(folder / PARAMETERS, json.dumps(parameters))
    return parameters, folder


class Trial:
    """A run that reports to NNI after every epoch of its method, and at its end.

    A result is a table: ``default`` is what the tuner looks at; beside it are the metric, ``relative_flops``, and the
    hyperparameters, because NNI with several trials at a time was seen to list them beside the wrong one.

    Args:
        settings: Settings of the run, which are checked.
        parameters: What the tuner chose.
        flops_price: Subtracted from the metric (added, where lower is better) for relative FLOPs of 1.

    Raises:
        ConfigError: If something in the settings cannot be used.
    """

    LEFT = ()

    def forecast(self) -> str:
        """What it would train."""
        return self._job.forecast()

    def __init__(self, settings: RunSettings, parameters: dict[str, Any], flops_price: float = 0.0) -> None:
        self._job = prepare_run(settings, _EpochResults(self))
        self._parameters, self._flops_price = parameters, flops_price

    def run(self, output: Path, console: Console) -> RunReport:
        """Run, and report the end.

        Raises:
            GBLRError: If the metric is not a number, which no tuner understands.
        """
        summary = self._job.run(output, console)
        metric, first = summary.metric, summary.methods[1]
        result = self.result(first.mean(metric), first.mean("relative_flops"))
        if not math.isfinite(result["default"]):
            raise GBLRError(f"the trial diverged: its {metric} is {first.mean(metric)}")
        nni.report_final_result({**result, "dense": summary[DENSE].mean(metric)})
        return summary

    def result(self, quality: float, relative_flops: float) -> dict[str, Any]:
        """What is reported about a network."""
        task = self._job.context.task
        penalty = self._flops_price * relative_flops
        return {
            "default": quality - penalty if task.higher_is_better else quality + penalty,
            task.metric: quality,
            "relative_flops": relative_flops,
            "metric": task.metric,
            "compressor": self._job.context.settings.methods[0].name,
            "parameters": self._parameters,
        }

    def epoch(self, network: torch.nn.Module, batches: Any, device: torch.device) -> None:
        """Report a network that is still being trained; the report does not change the training."""
        task = self._job.context.task
        with torch.random.fork_rng(devices=[]):  # loaders draw from it
            quality = evaluate(network, batches, task.metric, device)[task.metric]
            counted = report(network, task.example_input().to(device))
        result = self.result(quality, counted.relative_flops)
        if math.isfinite(result["default"]):
            nni.report_intermediate_result(result)


class _EpochResults(pl.Callback):
    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # the run gives one
        self._trial.epoch(pl_module.network, data.test_dataloader(), pl_module.device)
