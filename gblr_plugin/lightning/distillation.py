"""Distillation under a Trainer: a network learns by AdamW to return what another one returns."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..utils.rates import WarmupCosine
from .base import LightningModule, Trainer

__all__ = ["distil"]

WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


class _Distillation(LightningModule):
    """The student, the optimizer, and the schedule.

    Args:
        student: The network that learns.
        loss: Of a batch.
        steps: Of the optimizer.
        lr: Largest learning rate.
    """

    def __init__(self, student: nn.Module, loss: Callable[[Any], Tensor], steps: int, lr: float) -> None:
        super().__init__()
        self.student = student
        self._loss, self._steps, self._lr = loss, steps, lr

    def training_step(self, batch: Any, _index: int) -> Tensor:
        """The loss of a batch."""
        return self._loss(batch)

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters that have gradients, with a learning rate for each step."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self._lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(self._steps, WARMUP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def distil(
    student: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any], *, steps: int, lr: float, seed: int = 0
) -> None:
    """Train all parameters of a network that have gradients.

    Args:
        student: Changed in place; its training mode is kept.
        loss: ``loss(batch)``, differentiable in the parameters.
        batches: Gone through as often as the steps need, in drawn orders.
        steps: Number of steps, each on one batch.
        lr: Largest learning rate: it rises over the first steps and falls along a cosine.
        seed: Seed of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    examples: Any = batches  # a list is a map-style data set
    loader: DataLoader[Any] = DataLoader(examples, batch_size=None, shuffle=True, generator=generator)
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    module = _Distillation(student, loss, steps, lr)
    module.train(student.training)
    with _silent():
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu" if device.type == "cpu" else "auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, loader)
    student.to(device)


@contextmanager
def _silent() -> Iterator[None]:
    """Without Lightning's tips, and its warnings about workers, loggers and validation, of which there are none."""
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if "lightning" in name]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
