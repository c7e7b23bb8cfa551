"""From which of several starts a method is trained: each has a trial, judged on training data or on folds of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..tasks.base import PairsDataModule, Task
from ..utils.random_state import random_state, set_random_state
from .measure import evaluate
from .settings import Method

if TYPE_CHECKING:
    from .pipeline import Compressed, Job

__all__ = ["Fold", "best_start"]


class Fold:
    """A task without one part of its training data, which takes the place of the held-out data.

    Args:
        task: The whole task.
        index: Of the part, from 0.
        count: Number of parts, at least 2.
    """

    def __init__(self, task: Task, index: int, count: int) -> None:
        self._task, self._index, self._count = task, index, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """The other parts to train on, this one to judge by."""
        return self._task.data(seed, batch_size).fold(self._index, self._count)


def best_start(job: Job, method: Method, network: nn.Module, seed: int) -> tuple[str, Compressed | None]:
    """The start that is best after its trial, and the network of that trial where it was a whole training.

    Without folds the best has the lowest loss on training data. With folds it has the best figure of the task in the
    mean over parts of the training data, each of which neither the trial nor the dense network that it starts from has
    seen: one is trained for every fold. Held-out data is not looked at. Every trial draws the same random numbers.

    Args:
        job: The run.
        method: With its starts.
        network: The run's dense network.
        seed: Of the split.
    """
    training = (method.training or job.settings.finetune).shortened(method.trial)
    judged = job.task.metric if method.folds else "loss"
    sign = -1 if method.folds and job.task.higher_is_better else 1
    figures = dict.fromkeys(method.starts, 0.0)
    best, found = method.starts[0], None
    kept = random_state()

    def worse(start: str) -> float:
        return math.inf if math.isnan(figures[start]) else sign * figures[start]

    for part, begun in _parts(job, method, network, seed):
        data = part.data(seed, training)
        sample = data.test_dataloader() if method.folds else data.train_sample()
        for start in method.starts:
            set_random_state(kept)
            short = replace(job.starting(method, start), training=training)
            tried = part.compress_once(short, copy.deepcopy(begun), seed, label=f"{method.name}-from-{start}")
            figures[start] += evaluate(tried[0], sample, job.task.metric)[judged] / max(method.folds, 1)
            if method.trial == 1 and not method.folds and (found is None or worse(start) < worse(best)):
                best, found = start, tried
    best = min(method.starts, key=worse)
    set_random_state(kept)
    shown = ", ".join(f"{start} {figure:.4f}" for start, figure in figures.items())
    name = f"{judged} on {method.folds} unseen parts" if method.folds else f"training {judged}"
    job.say(f"seed {seed}  {method.name}  starts from {best!r}; {name} after a trial: {shown}")
    return best, found


def _parts(job: Job, method: Method, network: nn.Module, seed: int) -> Iterator[tuple[Job, nn.Module]]:
    """Where trials are made, and the network that they start from."""
    if not method.folds:
        yield job, network
    for index in range(method.folds):
        part = job.on(Fold(job.task, index, method.folds), f"fold{index}")
        yield part, network if method.start == "initial" else part.train_dense(seed)
