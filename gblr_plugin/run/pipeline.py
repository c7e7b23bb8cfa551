"""One run: per seed train the dense network, compress it by every method, convert, save, reload, evaluate, and time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from .. import __version__
from ..errors import ConfigError, first_line
from ..nni.training import check_comparable
from ..surgery.counting import report
from ..tasks.base import PairsDataModule
from ..utils.console import Console
from ..utils.progress import shown_by
from .compression import Compressed, make_compressor
from .context import DENSE, RunContext, environment
from .data import data_of
from .dense import dense_network, fit_dense
from .output import write_run
from .recording import Records
from .settings import Method, RunSettings
from .starting import Fold, compress, starting_from
from .summary import MethodResult, RunReport
from .trainer import check_trainer
from .unfinished import Unfinished

__all__ = ["Job", "check", "prepare_run"]


def check(context: RunContext) -> None:
    """Try everything once on a throw-away network, so that what cannot work is refused before any training.

    Raises:
        ConfigError: If the data, the weights to load, the network or a compressor's config cannot be used.
    """
    settings, task = context.settings, context.task
    check_trainer(settings.trainer)
    seed = settings.seeds[0]
    network = dense_network(context)
    data = data_of(task, seed, settings.dense)
    try:
        batch, _ = next(iter(data.test_dataloader()))
        report(network, batch[:1])
        report(network, task.example_input())
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"model: the network does not take the data of its task: {first_line(error)}") from error
    for method in settings.methods:
        if method.folds:
            data_of(Fold(task, 0, method.folds), seed, context.training_of(method))
        for candidate in [starting_from(context, method, start) for start in method.starts] or [method]:
            check_comparable(method.name, make_compressor(context, candidate, copy.deepcopy(network), seed)[0])


def prepare_run(settings: RunSettings, *watchers: pl.Callback) -> Job:
    """Check all that can be checked before anything is written.

    Args:
        settings: Settings of the run.
        watchers: Callbacks of every training under a method.

    Raises:
        ConfigError: If the task, its arguments, or a compressor's config is wrong.
    """
    context = RunContext.of(settings)
    check(context)
    return Job(replace(context, watchers=watchers))


class Job:
    """A run that is known to be well configured.

    Args:
        context: Says what to do; its console and events are those that :meth:`run` is given.
    """

    LEFT = (".unfinished",)

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.records = Records(context)

    def forecast(self) -> str:
        """What it would train, a line for each method."""
        context, settings = self.context, self.context.settings
        dense = "loaded" if settings.weights is not None else f"trained, epochs {settings.dense.epochs}"
        lines = [f"seeds {', '.join(map(str, settings.seeds))}; {DENSE}: {dense}"]
        for method in settings.methods:
            starts = f", starts to choose from: {', '.join(method.starts)}" if method.starts else ""
            lines.append(f"{method.name}: from {method.start}, epochs {context.training_of(method).epochs}{starts}")
        return "\n".join(lines)

    def run(self, output: Path, console: Console) -> RunReport:
        """Run all steps; files appear in ``output``, the report last.

        Args:
            output: An existing folder. Files of an earlier run stay until the new ones are complete. Trainings that a
                killed run of the same settings has finished are not done again.
            console: Console that shows the progress.

        Returns:
            The report.
        """
        settings, task = self.context.settings, self.context.task
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        events = output / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")
        self.context = replace(self.context, console=console, events=events)
        self.records = Records(self.context)
        about = {"settings": asdict(settings), "gblr_plugin": __version__, "torch": torch.__version__}
        unfinished = Unfinished(output / self.LEFT[0], about)
        for seed in settings.seeds:
            self._run_seed(seed, unfinished)
        names = [DENSE, *(method.name for method in settings.methods)]
        latency, records = self.records.latency(), self.records
        summary = RunReport(
            task=settings.task,
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            methods=[MethodResult(name, records.figures[name], latency[name], records.reports[name]) for name in names],
            environment=environment(),
            settings=asdict(settings),
        )
        write_run(output, summary, records)
        unfinished.remove()
        return summary

    def _run_seed(self, seed: int, unfinished: Unfinished) -> None:
        context, settings = self.context, self.context.settings
        pl.seed_everything(seed)
        data = data_of(context.task, seed, settings.dense)
        dense = dense_network(context)
        initial = copy.deepcopy(dense) if any(method.start == "initial" for method in settings.methods) else dense

        def train() -> Compressed:
            if settings.weights is None:
                fit_dense(context, dense, settings.dense, data, seed)
            return dense.eval(), {}

        trained = self._train_or_recall(DENSE, train, data, seed, unfinished)
        for method in settings.methods:
            begin = initial if method.start == "initial" else trained
            compress_begin = partial(self._compress, method, begin, seed)
            self._train_or_recall(method.name, compress_begin, data, seed, unfinished)

    def _compress(self, method: Method, network: nn.Module, seed: int) -> Compressed:
        pl.seed_everything(1000 + seed)
        with shown_by(lambda text: self.context.console.progress(f"seed {seed}  {method.name}  {text}")):
            return compress(self.context, method, copy.deepcopy(network), seed)

    def _train_or_recall(
        self, name: str, train: Callable[[], Compressed], data: PairsDataModule, seed: int, unfinished: Unfinished
    ) -> nn.Module:
        """A network of one seed, trained now, or by an earlier, killed run; its figures are recorded."""
        kept = unfinished.find(f"seed{seed}-{name}", self.context.task.network)
        if kept is not None:
            network, about = kept
            self.records.add(name, about["result"], network, about["history"])
            return network
        start = time.monotonic()
        network, history = train()
        result, reloaded = self.records.evaluate(network, data, start, seed)
        unfinished.keep(f"seed{seed}-{name}", network, {"result": result, "history": history})
        self.records.add(name, result, reloaded, history)
        return network
