"""One run: per seed train the dense network, compress it by every method, convert, save, reload, evaluate, and time."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import nni
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from .. import __version__, families
from ..errors import ConfigError
from ..lightning import GBLRCallback
from ..nni import LightningEvaluator, create_compressor
from ..serialization import load, read_state, save
from ..surgery.conversion import convert
from ..surgery.counting import report
from ..surgery.reorder import reorder
from ..surgery.report import Report
from ..tasks import get_task
from ..tasks.base import ClassifierModule, PairsDataModule
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.files import write_atomic, write_text
from ..utils.progress import shown_by
from .console import Console
from .measure import METRICS, evaluate, interleaved_latency
from .settings import Method, RunSettings, Training
from .starting import Fold, best_start
from .summary import MethodResult, RunReport
from .training import check_comparable, compress_and_train
from .unfinished import Unfinished

__all__ = ["DENSE", "Job", "config_list_of", "environment", "make_task", "prepare_run"]

DENSE = "dense"
Compressed = tuple[nn.Module, dict[str, list[tuple[int, float]]]]
"""A compressed network, and relative FLOPs, sigma and others over the steps."""
_CALIBRATED = ("agp", "gblr_fixed", "linear", *families.names())  # compressors that project dense weights
_LEARNED = ("gblr", "agp", "linear")  # compressors under which a structure changes while it trains


class _Progress(pl.Callback):
    """Shows the phase, epoch, relative FLOPs and time left on the console."""

    def __init__(self, console: Console, label: str) -> None:
        self._console, self._label = console, label
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        done = max(trainer.global_step, 1)
        left = (time.monotonic() - self._start) / done * max(total - done, 0)
        extra = "".join(
            f"  {short} {float(trainer.callback_metrics[key]):.3g}"
            for key, short in (("gblr/relative_flops", "rel. FLOPs"), ("gblr/sigma", "sigma"))
            if key in trainer.callback_metrics
        )
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._console.progress(f"{self._label}  {epoch}{extra}  {left:.0f} s left")


def prepare_run(settings: RunSettings) -> Job:
    """Check all that can be checked before anything is written.

    Raises:
        ConfigError: If the task, its arguments, or a compressor's config is wrong.
    """
    job = Job(settings)
    job.check()
    return job


class Job:
    """A run that is known to be well configured.

    Args:
        settings: What to do.

    Raises:
        ConfigError: If the task cannot be made.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.task = make_task(settings)
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.networks: dict[str, nn.Module] = {}
        self.reports: dict[str, Report] = {}
        self.histories: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.watchers: list[pl.Callback] = []  # of every training under a method
        self._events = Path()
        self._console = Console()

    def check(self) -> None:
        """Try everything once on a throw-away network, so that what cannot work is refused before any training.

        Raises:
            ConfigError: If the data, the weights to load, the network or a compressor's config cannot be used.
        """
        seed = self.settings.seeds[0]
        network = self._dense_network()
        data = self._data(seed, self.settings.dense)
        try:
            batch, _ = next(iter(data.test_dataloader()))
            report(network, batch[:1])
            report(network, self.task.example_input())
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"model: the network does not take the data of its task: {_one_line(error)}") from error
        for method in self.settings.methods:
            if method.folds:
                self.on(Fold(self.task, 0, method.folds), "fold0").data(seed, method.training)
            for one in [self.starting(method, start) for start in method.starts] or [method]:
                check_comparable(method.name, self._compressor(one, copy.deepcopy(network), seed)[0])

    def _dense_network(self) -> nn.Module:
        """A new network, or the trained one that the settings name."""
        network: nn.Module = self.task.network()
        if self.settings.weights is not None:
            _load_weights(network, self.settings.weights)
        return network

    def run(self, output: Path, console: Console) -> RunReport:
        """Do it all; files appear in ``output``, the report last.

        Args:
            output: An existing folder. Files of an earlier run stay until the new ones are complete. Trainings that a
                killed run of the same settings has finished are not done again.
            console: For progress.

        Returns:
            The report.
        """
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        self._console = console
        self._events = output / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")
        task = {"settings": asdict(self.settings), "gblr_plugin": __version__, "torch": torch.__version__}
        unfinished = Unfinished(output / ".unfinished", task)
        for seed in self.settings.seeds:
            self._one_seed(seed, unfinished)
        names = [DENSE, *(method.name for method in self.settings.methods)]
        latency = self._latency()
        summary = RunReport(
            task=self.settings.task,
            metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            methods=[MethodResult(name, self.results[name], latency[name], self.reports[name]) for name in names],
            environment=environment(),
            settings=asdict(self.settings),
        )
        self._write(output, summary)
        unfinished.remove()
        return summary

    def _latency(self) -> dict[str, dict[str, float]]:
        latency: dict[str, dict[str, float]] = {name: {} for name in self.networks}
        for batch in self.settings.latency_batch:
            self._console.progress(f"latency at batch {batch}")
            seconds = interleaved_latency(self.networks, self.task.example_input(batch))
            for name, value in seconds.items():
                latency[name][str(batch)] = 1e3 * value
        return latency

    def _write(self, output: Path, summary: RunReport) -> None:
        first = self.settings.methods[0].name
        save(self.networks[DENSE], output / "dense.safetensors")
        save(self.networks[first], output / "model.safetensors")
        _draw(output / "figures", summary, self.networks[first], self.histories[first])
        write_text(output / "report.txt", f"{summary}\n")
        write_text(output / "report.json", summary.to_json())

    def _trainer(self, training: Training, callbacks: Sequence[pl.Callback], seed: int, name: str) -> Any:
        logger = TensorBoardLogger(str(self._events), name=f"seed{seed}-{name}", version="")
        return nni.trace(pl.Trainer)(
            max_epochs=training.epochs,
            accelerator="auto",
            logger=logger,
            callbacks=[*callbacks, _Progress(self._console, f"seed {seed}  {name}")],
            limit_train_batches=training.limit_train_batches,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=10,
        )

    def _module(self, network: nn.Module, training: Training, batches: int) -> ClassifierModule:
        module: ClassifierModule = self.task.module(network, training, training.steps(batches))
        module.optimizer_class = nni.trace(torch.optim.AdamW)
        module.scheduler_class = nni.trace(torch.optim.lr_scheduler.LambdaLR)
        return module

    def _data(self, seed: int, training: Training) -> PairsDataModule:
        make = nni.trace(PairsDataModule)
        plain = self.task.data(seed, training.batch_size)
        if len(plain.train_set) < training.batch_size:
            raise ConfigError(
                f"data: {len(plain.train_set)} training examples are less than one batch of {training.batch_size}"
            )
        if len(plain.held_out) < 1:
            raise ConfigError("data: there is no held-out example to evaluate on")
        return make(  # type: ignore[no-any-return]  # untyped host
            plain.train_set, plain.held_out, training.batch_size, seed, plain.workers, plain.evaluation, plain.stretch
        )

    def show_on(self, console: Console, events: Path) -> None:
        """Where progress and TensorBoard events go.

        Args:
            console: For progress.
            events: A folder, made when it is needed.
        """
        self._console, self._events = console, events

    def data(self, seed: int, training: Training | None = None) -> PairsDataModule:
        """The data of a seed in the batches of a phase; default the fine-tuning."""
        return self._data(seed, training or self.settings.finetune)

    def train_dense(
        self,
        seed: int,
        network: nn.Module | None = None,
        training: Training | None = None,
        random_seed: int | None = None,
    ) -> nn.Module:
        """A trained dense network in evaluation mode.

        Args:
            seed: Of the split.
            network: Trained further; default a new one.
            training: How; default the settings' ``dense``.
            random_seed: Of initialisation, shuffling and dropout; default ``seed``.
        """
        pl.seed_everything(seed if random_seed is None else random_seed)
        training = training or self.settings.dense
        data = self._data(seed, training)
        network = self._dense_network() if network is None else network.train()
        self._fit_dense(network, training, data, seed)
        return network.eval()

    def _fit_dense(self, network: nn.Module, training: Training, data: PairsDataModule, seed: int) -> None:
        module = self._module(network, training, len(data.train_dataloader()))
        self._trainer(training, [], seed, DENSE).get().fit(module, data)

    def _one_seed(self, seed: int, unfinished: Unfinished) -> None:
        pl.seed_everything(seed)
        training = self.settings.dense
        data = self._data(seed, training)
        dense = self._dense_network()
        initial = copy.deepcopy(dense) if any(method.start == "initial" for method in self.settings.methods) else dense
        start = time.monotonic()
        kept = unfinished.find(f"seed{seed}-{DENSE}", self.task.network)
        if kept is not None:
            dense = self._recall(DENSE, *kept)
        else:
            if self.settings.weights is None:
                self._fit_dense(dense, training, data, seed)
            self._record(DENSE, dense.eval(), data, start, seed, unfinished)
        for method in self.settings.methods:
            kept = unfinished.find(f"seed{seed}-{method.name}", self.task.network)
            if kept is not None:
                self._recall(method.name, *kept)
                continue
            pl.seed_everything(1000 + seed)
            start = time.monotonic()
            with shown_by(lambda text, name=method.name: self._console.progress(f"seed {seed}  {name}  {text}")):  # type: ignore[misc]  # binds name
                begun = initial if method.start == "initial" else dense
                network = self.compress(method, copy.deepcopy(begun), seed)
            self._record(method.name, network, data, start, seed, unfinished)

    def _compressor(
        self, method: Method, network: nn.Module, seed: int, calibrated: bool = True, label: str | None = None
    ) -> tuple[Any, ClassifierModule, GBLRCallback]:
        """A method's compressor, bound to an evaluator, the module it works on, and what watches its structure.

        Its TensorBoard events go by the label, which is the method's name if there is none.
        """
        training = method.training or self.settings.finetune
        data = self._data(seed, training)
        batches = len(data.train_dataloader())
        steps = training.steps(batches)
        module = self._module(network, training, batches)
        if self.settings.reorder:
            reorder(module, self.settings.reorder, example_input=self.task.example_input())
        if training.distillation:
            module.learn_from(copy.deepcopy(network))
        monitor = GBLRCallback(budget=None, picture_every_n_epochs=max(training.epochs // 8, 1))
        learned = method.name in _LEARNED and method.options.get("pruner", "gblr") == "gblr"
        watching = [*([monitor] if learned else []), *self.watchers]
        options = dict(method.options)
        if method.name in ("gblr", "movement"):
            options.setdefault("warmup_step", round(method.warmup * steps))
            options.setdefault("cooldown_begin_step", max(round((1 - method.cooldown) * steps), 1))
        evaluator = LightningEvaluator(self._trainer(training, watching, seed, label or method.name), data)
        calibration = method.calibration or self.settings.calibration
        if calibrated and calibration is not None and method.options.get("pruner", method.name) in _CALIBRATED:
            options.setdefault("calibration", calibration)
        config_list = config_list_of(method, self.settings, self.task)
        if method.compact and method.name == "gblr":
            config_list = [{"gblr_compact": True, **entry} for entry in config_list]
        return create_compressor(method.name, module, config_list, evaluator, **options), module, monitor

    def compress(
        self, method: Method, network: nn.Module, seed: int, *, calibrated: bool = True, train: bool = True
    ) -> nn.Module:
        """The network, compressed by a method, fine-tuned and converted.

        Args:
            method: How.
            network: Trained dense network; used up.
            seed: Of the split.
            calibrated: Whether a one-shot start is fitted to the calibration batches, if the settings have some.
            train: Whether it is fine-tuned; for methods that are one-shot starts.
        """
        found = None
        if method.starts:
            best, found = best_start(self, method, network, seed)
            method = self.starting(method, best)
        if found is None:
            found = self.compress_once(method, network, seed, calibrated=calibrated, train=train)
        network, history = found
        self.histories.setdefault(method.name, history)
        return network

    def compress_once(
        self,
        method: Method,
        network: nn.Module,
        seed: int,
        *,
        calibrated: bool = True,
        train: bool = True,
        label: str | None = None,
    ) -> Compressed:
        """The compressed network and how its structure formed, from one start; as :meth:`compress` otherwise."""
        compressor, module, monitor = self._compressor(method, network.train(), seed, calibrated, label)
        if train:
            compress_and_train(compressor, (method.training or self.settings.finetune).epochs)
        return convert(module.network).eval(), monitor.history

    def starting(self, method: Method, start: str) -> Method:
        """The method from one start."""
        entries = config_list_of(method, self.settings, self.task)
        for entry in entries:
            entry.pop("gblr_initialiser", None)
            entry["gblr"] = {**entry.get("gblr", {}), "initialiser": start}
        return replace(method, starts=[], folds=0, config_list=entries)

    def on(self, task: Any, name: str) -> Job:
        """The same job on another task; its TensorBoard events go to a folder of that name."""
        other = copy.copy(self)
        other.task, other._events = task, self._events / name
        return other

    def say(self, line: str) -> None:
        """A line for the console and the log."""
        self._console.line(line)

    def _record(
        self, name: str, network: nn.Module, data: PairsDataModule, start: float, seed: int, unfinished: Unfinished
    ) -> None:
        """Evaluate the network as it is, and as it comes back from a saved file."""
        metric = self.task.metric
        figures = evaluate(network, data.test_dataloader(), metric)
        train = evaluate(network, data.train_dataloader(), metric)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save(network, path)
            reloaded = load(path, self.task.network)
            size = path.stat().st_size
        again = evaluate(reloaded, data.test_dataloader(), metric)
        counted = report(network, self.task.example_input())
        result = {
            "seed": seed,
            **figures,
            f"train_{metric}": train[metric],
            f"reloaded_{metric}": again[metric],
            "relative_flops": counted.relative_flops,
            "model_relative_flops": counted.model_relative_flops,
            "multiply_adds": counted.multiply_adds,
            "parameters": counted.parameters,
            "file_bytes": size,
            "seconds": time.monotonic() - start,
        }
        unfinished.keep(f"seed{seed}-{name}", network, {"result": result, "history": self.histories.get(name, {})})
        self._take(name, result, reloaded)

    def _recall(self, name: str, network: nn.Module, figures: dict[str, Any]) -> nn.Module:
        """Take over what an earlier, killed run has trained."""
        history = {key: [(step, value) for step, value in points] for key, points in figures["history"].items()}
        if history:
            self.histories.setdefault(name, history)
        self._take(name, figures["result"], network)
        return network

    def _take(self, name: str, result: dict[str, Any], network: nn.Module) -> None:
        self.results.setdefault(name, []).append(result)
        if result["seed"] == self.settings.seeds[0]:
            self.networks[name] = network
            self.reports[name] = report(network, self.task.example_input())
        metric = self.task.metric
        self._console.line(
            f"seed {result['seed']}  {name:<12} {metric} {result[metric]:.3f}  "
            f"rel. FLOPs {result['relative_flops']:.4f}  {result['seconds']:.0f} s"
        )


def environment() -> dict[str, Any]:
    """Versions, threads and processor, for a report."""
    import platform

    return {
        "gblr_plugin": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor()


def _draw(folder: Path, summary: RunReport, network: nn.Module, history: dict[str, list[tuple[int, float]]]) -> None:
    """Figures, where matplotlib is installed."""
    try:
        from .. import plot
    except ImportError:
        return
    figures = {"pareto": plot.pareto([summary])}
    if any(isinstance(parameter.data, GBLRTensor) for parameter in network.parameters()):
        figures["structure"] = plot.structure(network)
    if history:
        figures["curves"] = plot.curves(history)
    for name, figure in figures.items():
        write_atomic(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=150))


def _load_weights(network: nn.Module, path: str) -> None:
    """Load a dense network's weights: a file of :func:`gblr_plugin.save`, a torch.save state dict, or safetensors."""
    state = read_state(path, "weights")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"weights: {path!r} does not fit the network: {reason}") from error


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def config_list_of(method: Method, settings: RunSettings, task: Any) -> list[dict[str, Any]]:
    """NNI's compression config of a method: its own, the run's, or the task's layers at the run's budget."""
    given = settings.config_list if method.config_list is None else method.config_list
    if given is not None:
        return copy.deepcopy(given)
    entry: dict[str, Any] = {"op_names": list(task.layers), "sparse_ratio": 1 - (settings.budget or 1.0)}
    if settings.allocation is not None:
        entry |= {"global_group_id": "all", "gblr": {"allocation": settings.allocation}}
    return [entry]


def make_task(settings: RunSettings) -> Any:
    """The task that the settings name, made with its arguments.

    Raises:
        ConfigError: If there is none, or an argument is wrong.
    """
    kind = get_task(settings.task)
    try:
        task = kind(**settings.model)
    except TypeError as error:
        raise ConfigError(f"model: {error}") from error
    if getattr(task, "metric", None) not in METRICS:
        raise ConfigError(
            f"task: {settings.task!r} is judged by {getattr(task, 'metric', None)!r}; allowed are {', '.join(METRICS)}"
        )
    return task
