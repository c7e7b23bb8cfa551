"""The data of a task in the batches of a training phase, such that NNI can make its loaders anew."""

from __future__ import annotations

from typing import Any

import nni

from ..errors import ConfigError
from ..tasks.base import PairsDataModule
from .settings import Training

__all__ = ["data_of"]


def data_of(task: Any, seed: int, training: Training) -> PairsDataModule:
    """Training and held-out data of a task.

    Args:
        task: The run's task, or a fold of it.
        seed: Seed of the split and the shuffling.
        training: Settings of the training, which give the batch size.

    Raises:
        ConfigError: If there is less than one training batch, or no held-out example.
    """
    plain = task.data(seed, training.batch_size)
    if len(plain.train_set) < training.batch_size:
        raise ConfigError(
            f"data: {len(plain.train_set)} training examples are less than one batch of {training.batch_size}"
        )
    if len(plain.held_out) < 1:
        raise ConfigError("data: there is no held-out example to evaluate on")
    return nni.trace(PairsDataModule)(  # type: ignore[no-any-return]  # untyped host
        plain.train_set, plain.held_out, training.batch_size, seed, plain.workers, plain.evaluation, plain.stretch
    )
