"""The training of the dense network, and the Lightning trainer and module that every phase of a run uses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import nni
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from ..errors import ConfigError
from ..serialization import read_state
from ..tasks.base import ClassifierModule, PairsDataModule
from ..utils.console import Console
from .context import DENSE, RunContext
from .data import data_of
from .settings import Training
from .trainer import accumulated, trainer_options

__all__ = ["dense_network", "fit_dense", "make_module", "make_trainer", "train_dense"]


class _Progress(pl.Callback):
    """Shows the phase, epoch, relative FLOPs and time left on the console."""

    def __init__(self, console: Console, label: str) -> None:
        self._console, self._label = console, label
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        total = math.ceil(int(trainer.num_training_batches) / trainer.accumulate_grad_batches)
        total *= int(trainer.max_epochs or 1)
        done = max(trainer.global_step, 1)
        left = (time.monotonic() - self._start) / done * max(total - done, 0)
        extra = "".join(
            f"  {short} {float(trainer.callback_metrics[key]):.3g}"
            for key, short in (("gblr/relative_flops", "rel. FLOPs"), ("gblr/sigma", "sigma"))
            if key in trainer.callback_metrics
        )
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._console.progress(f"{self._label}  {epoch}{extra}  {left:.0f} s left")


def make_trainer(
    context: RunContext, training: Training, callbacks: Sequence[pl.Callback], seed: int, name: str
) -> Any:
    """A trainer that NNI can make anew; its events go by the seed and the name."""
    logger = TensorBoardLogger(str(context.events), name=f"seed{seed}-{name}", version="")
    return nni.trace(pl.Trainer)(
        max_epochs=training.epochs,
        logger=logger,
        callbacks=[*callbacks, _Progress(context.console, f"seed {seed}  {name}")],
        limit_train_batches=training.limit_train_batches,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **trainer_options(context.settings.trainer),
    )


def make_module(context: RunContext, network: nn.Module, training: Training, batches: int) -> ClassifierModule:
    """The task's Lightning module for a phase of so many batches an epoch; NNI can make its optimizers anew."""
    module: ClassifierModule = context.task.module(
        network, training, training.steps(batches, accumulated(context.settings.trainer))
    )
    module.optimizer_class = nni.trace(torch.optim.AdamW)
    module.scheduler_class = nni.trace(torch.optim.lr_scheduler.LambdaLR)
    return module


def dense_network(context: RunContext) -> nn.Module:
    """A new network, or the trained one that the settings name.

    Raises:
        ConfigError: If its weights cannot be read, or do not fit.
    """
    network: nn.Module = context.task.network()
    path = context.settings.weights
    if path is None:
        return network
    state = read_state(path, "weights")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"weights: {path!r} does not fit the network: {reason}") from error
    return network


def fit_dense(context: RunContext, network: nn.Module, training: Training, data: PairsDataModule, seed: int) -> None:
    """Train a dense network in place."""
    module = make_module(context, network, training, len(data.train_dataloader()))
    make_trainer(context, training, [], seed, DENSE).get().fit(module, data)


def train_dense(
    context: RunContext,
    seed: int,
    network: nn.Module | None = None,
    training: Training | None = None,
    random_seed: int | None = None,
) -> nn.Module:
    """A trained dense network in evaluation mode.

    Args:
        context: Context of the run.
        seed: Seed of the split.
        network: Trained further; default a new one.
        training: Settings of the training; default the settings' ``dense``.
        random_seed: Seed of initialisation, shuffling and dropout; default ``seed``.
    """
    pl.seed_everything(seed if random_seed is None else random_seed)
    training = training or context.settings.dense
    data = data_of(context.task, seed, training)
    network = dense_network(context) if network is None else network.train()
    fit_dense(context, network, training, data, seed)
    return network.eval()
