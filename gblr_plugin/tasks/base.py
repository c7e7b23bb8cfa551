"""What a task provides, and the Lightning module and data module that the built-in tasks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import ConfigError
from ..utils.rates import WarmupCosine
from ..utils.validation import check_count

__all__ = [
    "IGNORED",
    "BuiltInTask",
    "ClassifierModule",
    "PairsDataModule",
    "Task",
    "TrainSettings",
    "check_sizes",
    "make_network",
]

IGNORED = -100
"""Target that counts neither for the loss nor for the metric, as in ``torch.nn.functional.cross_entropy``."""


class TrainSettings(Protocol):
    """The part of a run's settings that a task's module needs; see :class:`gblr_plugin.run.settings.Training`."""

    epochs: int
    lr: float
    weight_decay: float
    warmup_fraction: float
    batch_size: int
    label_smoothing: float
    distillation: float
    temperature: float


class Task(Protocol):
    """A network, its data, and the figure by which it is judged.

    Attributes:
        metric: Name of the figure, logged as ``test_<metric>``.
        higher_is_better: Direction of the metric.
        layers: Glob patterns of the layers that are compressed unless the config says otherwise.
    """

    metric: str
    higher_is_better: bool
    layers: list[str]

    def network(self) -> nn.Module:
        """A new, randomly initialised network."""

    def module(self, network: nn.Module, training: TrainSettings, steps: int) -> ClassifierModule:
        """The Lightning module that trains ``network`` for ``steps`` optimizer steps."""

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """The data, split by ``seed``."""

    def example_input(self, batch: int = 1) -> Tensor:
        """An input of the network, for counting and timing."""


def check_sizes(least: int = 1, **sizes: object) -> None:
    """Refuse arguments of a task or network that are not ints of at least ``least``.

    Raises:
        ConfigError: Naming the argument.
    """
    for name, value in sizes.items():
        check_count(f"model: {name}", value, least)


def make_network(kind: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """A network of a class, from the arguments of a config.

    Raises:
        ConfigError: For an argument that the class does not have.
    """
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model: {error}") from error


class BuiltInTask:
    """What the built-in tasks share: classification trained by cross-entropy."""

    metric = "accuracy"
    higher_is_better = True
    layers: list[str] = []

    def module(self, network: nn.Module, training: TrainSettings, steps: int) -> ClassifierModule:
        """Cross-entropy training."""
        return ClassifierModule(network, training, self.metric, steps)


class ClassifierModule(pl.LightningModule):
    """Cross-entropy training of a network over (input, target) batches, with linear warm-up and cosine decay.

    Args:
        network: Maps inputs to logits whose last dimension is the class.
        training: Learning rate, weight decay, warm-up and label smoothing.
        metric: ``"accuracy"``, or ``"perplexity"``, the exponential of the mean cross-entropy.
        steps: Optimizer steps that the schedule spans.
    """

    def __init__(self, network: nn.Module, training: TrainSettings, metric: str, steps: int) -> None:
        super().__init__()
        self._teacher: list[nn.Module] = []  # in a list, which nn.Module does not look into
        self.network = network
        self.training_settings = training
        self.metric = metric
        self.schedule = WarmupCosine(steps, training.warmup_fraction)
        # NNI re-creates optimizers and schedulers, for which it wants traced classes; see nni.trace.
        self.optimizer_class: Callable[..., Any] = torch.optim.AdamW
        self.scheduler_class: Callable[..., Any] = torch.optim.lr_scheduler.LambdaLR

    @property
    def teacher(self) -> nn.Module | None:
        """The network whose predictions are learned too."""
        return self._teacher[0] if self._teacher else None

    def learn_from(self, teacher: nn.Module) -> None:
        """Learn a network's predictions too, as far as ``training.distillation`` says.

        It does not become a part of this module: nothing of it is trained, compressed or saved.

        Args:
            teacher: Used in evaluation mode; on the module's device from the first step on.
        """
        self._teacher = [teacher.eval().requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(x)
        return logits

    def _loss(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), label_smoothing=smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        x, target = batch
        logits = self(x)
        loss = self._loss(logits, target, self.training_settings.label_smoothing)
        if self.teacher is not None:
            share = self.training_settings.distillation
            loss = (1 - share) * loss + share * self._distance(logits, x, target)
        self.log("train_loss", loss)
        return loss

    def _distance(self, logits: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """T^2 KL(teacher / T || logits / T), mean over the targets that count (Hinton et al. 2015, Sec. 2)."""
        assert self.teacher is not None
        temperature = self.training_settings.temperature
        with torch.no_grad():
            taught = self.teacher.to(x.device)(x)
        counted = target.flatten() != IGNORED
        log_p, log_q = (F.log_softmax(x.flatten(0, -2)[counted] / temperature, -1) for x in (taught, logits))
        return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, target = batch
        logits = self(x)
        loss = self._loss(logits, target)
        self.log(f"{stage}_loss", loss, batch_size=len(x), prog_bar=True)
        if self.metric == "accuracy":
            correct = (logits.argmax(-1) == target).float().mean()
            self.log(f"{stage}_accuracy", correct, batch_size=len(x), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and metric of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and metric of one batch."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW under linear warm-up and cosine decay, stepped once per batch."""
        settings = self.training_settings
        optimizer = self.optimizer_class(self.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        scheduler = self.scheduler_class(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class PairsDataModule(pl.LightningDataModule):
    """Data loaders over training and held-out sets of (input, target).

    Args:
        train: Training set.
        held_out: Held-out set, for validation and test.
        batch_size: Examples in a training batch.
        seed: Seed of the shuffling.
        workers: Processes that load; 0 loads in the training process.
        evaluation: Size of evaluation batches over that of training batches.
        stretch: Neighbours in the training set that belong together, as overlapping windows of a text do: parts of the
            training set are made of stretches of this many.
    """

    def __init__(
        self,
        train: Dataset[Any],
        held_out: Dataset[Any],
        batch_size: int,
        seed: int,
        workers: int = 0,
        evaluation: int = 4,
        stretch: int = 1,
    ) -> None:
        super().__init__()
        self.train_set, self.held_out = train, held_out
        self.batch_size, self.seed = batch_size, seed
        self.workers, self.evaluation, self.stretch = workers, evaluation, stretch

    def fold(self, index: int, count: int) -> PairsDataModule:
        """The training set without one of ``count`` parts, which is held out in place of the held-out set.

        Every ``count``-th stretch of neighbours belongs to one part, so that parts of a set sorted by class have all.

        Args:
            index: Of the part, from 0.
            count: Number of parts, at least 2.
        """
        sized: Any = self.train_set
        fold_of = [place // self.stretch % count for place in range(len(sized))]
        train, held_out = (
            Subset(self.train_set, [place for place, fold in enumerate(fold_of) if (fold == index) == held])
            for held in (False, True)
        )
        return PairsDataModule(train, held_out, self.batch_size, self.seed, self.workers, self.evaluation, self.stretch)

    def _loader(self, examples: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        on_gpu = torch.cuda.is_available()  # page-locked batches are copied to the GPU while it computes
        return DataLoader(examples, batch_size, num_workers=self.workers, pin_memory=on_gpu, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, the last partial one dropped."""
        generator = torch.Generator().manual_seed(self.seed)
        keep = self.workers > 0  # workers live on from epoch to epoch
        return self._loader(
            self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator, persistent_workers=keep
        )

    def sample(self, held_out: bool, most: int | None = None) -> DataLoader[Any]:
        """Examples to evaluate on, evenly spread over a set, in a fixed order.

        Args:
            held_out: Whether of the held-out set, or of the training set, as it is trained on.
            most: Largest number of examples; of either set no more are taken than there are held-out ones.
        """
        examples: Any = self.held_out if held_out else self.train_set
        unseen: Any = self.held_out
        there = len(examples)
        count = min(there, len(unseen), most or there)
        chosen = Subset(examples, [place * there // count for place in range(count)])
        return self._loader(chosen, self.evaluation * self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out batches in order."""
        return self._loader(self.held_out, self.evaluation * self.batch_size)

    test_dataloader = val_dataloader
