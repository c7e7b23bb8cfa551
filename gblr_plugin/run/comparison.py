"""`gblr compare`: methods at equal multiply-adds, over budgets and seeds; one-shot, calibrated and fine-tuned."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from .. import families
from ..errors import ConfigError
from ..nni.settings import read_config
from ..serialization import load_into, save
from ..surgery.counting import report
from ..utils.console import Console
from ..utils.files import write_text
from .comparison_report import PHASES, ComparisonReport, Row
from .comparison_settings import ComparisonSettings
from .compression import compress_once
from .context import DENSE, RunContext, config_list_of, environment
from .data import data_of
from .dense import train_dense
from .output import draw
from .pipeline import check
from .recording import evaluate_both
from .settings import Method
from .starting import compress

__all__ = ["Comparison"]

_FIXED = {name: name for name in families.names()} | {"gblr": "gblr_fixed", "gblr_fixed": "gblr_fixed"}
"""Methods that start from a projection of the dense weights, and the compressor that does this alone."""


class Comparison:
    """A comparison whose settings were checked. After an interruption it continues where it stopped.

    Args:
        settings: What to do.

    Raises:
        ConfigError: If the task, the data or the config of a method cannot be used.
    """

    LEFT = ("comparison.json", "dense")

    def __init__(self, settings: ComparisonSettings) -> None:
        self.settings = settings
        self._contexts = {budget: RunContext.of(settings.at(budget)) for budget in settings.budgets}
        self._any = next(iter(self._contexts.values()))
        for budget in {min(settings.budgets), max(settings.budgets)}:
            check(self._contexts[budget])

    def forecast(self) -> str:
        """What it would measure."""
        settings = self.settings
        phases = sum(len(list(self._phases(method))) for method in settings.methods)
        methods = ", ".join(method.name for method in settings.methods)
        return (
            f"{methods} at budgets {', '.join(f'{budget:g}' for budget in settings.budgets)} over seeds "
            f"{', '.join(map(str, settings.seeds))}: {phases * len(settings.budgets) * len(settings.seeds)} networks"
        )

    def run(self, output: Path, console: Console) -> ComparisonReport:
        """Run all rows; ``comparison.json`` in ``output`` is complete after every row.

        Args:
            output: An existing folder.
            console: Console that shows the progress.

        Returns:
            The report, also written as a table and, where matplotlib is installed, drawn.

        Raises:
            ConfigError: If the folder holds a comparison of other settings.
        """
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        result = self._earlier(output)
        events = output / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")
        self._contexts = {
            budget: replace(context, console=console, events=events) for budget, context in self._contexts.items()
        }
        self._any = next(iter(self._contexts.values()))
        for seed in self.settings.seeds:
            dense = self._dense(seed, output, result, console)
            for budget, context in self._contexts.items():
                for method in self.settings.methods:
                    missing = [p for p in self._phases(method) if result.find(method.name, budget, p, seed) is None]
                    for phase in missing:
                        self._add_row(context, method, budget, phase, seed, copy.deepcopy(dense), result)
                        self._done(output, result, console)
        write_text(output / "comparison.txt", f"{result}\n")
        draw(output, {"comparison": lambda plot: plot.comparison(result)})
        return result

    def _earlier(self, output: Path) -> ComparisonReport:
        """What an interrupted run of the same settings has done, or an empty report."""
        task = self._any.task
        fresh = ComparisonReport(
            self.settings.task, task.metric, task.higher_is_better, [], environment(), asdict(self.settings)
        )
        file = output / "comparison.json"
        if not file.exists():
            return fresh
        try:
            earlier = ComparisonReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--output: {str(file)!r} is not a report of gblr compare") from error
        if earlier.settings != json.loads(json.dumps(fresh.settings)):
            raise ConfigError(f"--output: {str(output)!r} holds a comparison of other settings; choose another folder")
        fresh.rows.extend(earlier.rows)
        return fresh

    def _done(self, output: Path, result: ComparisonReport, console: Console) -> None:
        write_text(output / "comparison.json", result.to_json())
        row = result.rows[-1]
        console.line(
            f"seed {row.seed}  {row.budget:<6g} {row.method:<14} {row.phase:<11} {result.metric} {row.held_out:.3f}  "
            f"rel. FLOPs {row.relative_flops:.4f}  {row.seconds:.0f} s"
        )

    def _phases(self, method: Method) -> Iterator[str]:
        for phase in PHASES:
            if phase != "fine_tuned" and method.name not in _FIXED:
                continue  # chosen while they train
            if phase != "calibrated" or self.settings.calibration is not None or method.calibration is not None:
                yield phase

    def _dense(self, seed: int, output: Path, result: ComparisonReport, console: Console) -> nn.Module:
        """The seed's trained network; also recorded as it is and after the fine-tuning that the others get."""
        path = output / "dense" / f"seed{seed}.safetensors"
        context = self._any
        if not path.exists() or result.find(DENSE, 1.0, "one_shot", seed) is None:
            start = time.monotonic()
            network = train_dense(context, seed)
            save(network, path)
            self._record(result, context, DENSE, 1.0, "one_shot", seed, network, 1.0, start)
            self._done(output, result, console)
        network = load_into(path, context.task.network)
        if result.find(DENSE, 1.0, "fine_tuned", seed) is None:
            start = time.monotonic()
            longer = train_dense(context, seed, copy.deepcopy(network), self.settings.finetune, 1000 + seed)
            self._record(result, context, DENSE, 1.0, "fine_tuned", seed, longer, 1.0, start)
            self._done(output, result, console)
        return network

    def _add_row(
        self, context: RunContext, method: Method, budget: float, phase: str, seed: int, network: nn.Module, result: Any
    ) -> None:
        """One row: the network compressed by a method at a budget, as far as the phase goes."""
        pl.seed_everything(1000 + seed)
        start = time.monotonic()
        entries = config_list_of(method, context.settings, context.task)
        chosen = list(read_config(_named(network), entries).layers)
        if phase == "fine_tuned":
            network, _ = compress(context, method, network, seed)
        else:
            plain = replace(method, name=_FIXED[method.name], options={}, compact=False, starts=[], folds=0)
            network, _ = compress_once(context, plain, network, seed, calibrated=phase == "calibrated", train=False)
        share = _share_left(_named(network), chosen) if method.name not in _FIXED else None
        counted = report(network, context.task.example_input()).relative_flops if share is None else share
        self._record(result, context, method.name, budget, phase, seed, network, counted, start)

    def _record(
        self,
        result: ComparisonReport,
        context: RunContext,
        method: str,
        budget: float,
        phase: str,
        seed: int,
        network: nn.Module,
        relative_flops: float,
        start: float,
    ) -> None:
        data = data_of(context.task, seed, self.settings.finetune)
        held_out, train = evaluate_both(network, data, context)
        result.rows.append(
            Row(
                method,
                budget,
                phase,
                seed,
                relative_flops,
                held_out[result.metric],
                held_out["loss"],
                train[result.metric],
                train["loss"],
                time.monotonic() - start,
            )
        )


def _named(network: nn.Module) -> nn.Module:
    """The network under the name that it has inside the task's module, to which config lists refer."""
    return nn.ModuleDict({"network": network})


def _share_left(model: nn.Module, chosen: list[str]) -> float:
    """Weights that a mask left of the chosen layers: the multiply-adds of a product that could skip every zero."""
    weights: list[Any] = [model.get_submodule(name).weight for name in chosen]
    return float(sum(int((weight != 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights))
