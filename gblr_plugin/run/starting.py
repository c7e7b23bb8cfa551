"""Compression from the best of several starts: each has a trial, judged on training data or on folds of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..tasks.base import PairsDataModule, Task
from ..utils.random_state import random_state, set_random_state
from .compression import Compressed, compress_once
from .context import RunContext, config_list_of
from .data import data_of
from .dense import train_dense
from .measure import evaluate
from .settings import Method
from .trainer import device_of

__all__ = ["Fold", "best_start", "compress", "starting_from"]


class Fold:
    """A task without one part of its training data, which takes the place of the held-out data.

    Args:
        task: The task with all of its data.
        index: Number of the part, from 0.
        count: Number of parts, at least 2.
    """

    def __init__(self, task: Task, index: int, count: int) -> None:
        self._task, self._index, self._count = task, index, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """The other parts to train on, this one to judge by."""
        return self._task.data(seed, batch_size).fold(self._index, self._count)


def compress(context: RunContext, method: Method, network: nn.Module, seed: int, **options: Any) -> Compressed:
    """The network, compressed by a method from its best start; arguments as :func:`~.compression.compress_once`."""
    if method.starts:
        best, found = best_start(context, method, network, seed)
        if found is not None:
            return found
        method = starting_from(context, method, best)
    return compress_once(context, method, network, seed, **options)


def starting_from(context: RunContext, method: Method, start: str) -> Method:
    """The method from one start."""
    entries = config_list_of(method, context.settings, context.task)
    for entry in entries:
        entry.pop("gblr_initialiser", None)
        entry["gblr"] = {**entry.get("gblr", {}), "initialiser": start}
    return replace(method, starts=[], folds=0, config_list=entries)


def best_start(context: RunContext, method: Method, network: nn.Module, seed: int) -> tuple[str, Compressed | None]:
    """The start that is best after its trial, and the network of that trial where it was a full training.

    Without folds the best has the lowest loss on training data. With folds it has the best figure of the task in the
    mean over parts of the training data, each of which neither the trial nor the dense network that it starts from has
    seen: one is trained for every fold. Held-out data is not looked at. Every trial draws the same random numbers.

    Args:
        context: Context of the run.
        method: The method and its starts.
        network: The run's dense network.
        seed: Seed of the split.
    """
    task, training = context.task, context.training_of(method).shortened(method.trial)
    judged = task.metric if method.folds else "loss"
    sign = -1 if method.folds and task.higher_is_better else 1
    figures = dict.fromkeys(method.starts, 0.0)
    best, found = method.starts[0], None
    kept = random_state()

    def badness(start: str) -> float:
        return math.inf if math.isnan(figures[start]) else sign * figures[start]

    for ground, begun in _trial_grounds(context, method, network, seed):
        data = data_of(ground.task, seed, training)
        sample = data.sample(method.folds > 0, context.settings.evaluate_on)
        for start in method.starts:
            set_random_state(kept)
            short = replace(starting_from(context, method, start), training=training)
            tried = compress_once(ground, short, copy.deepcopy(begun), seed, label=f"{method.name}-from-{start}")
            figures[start] += evaluate(tried[0], sample, task.metric, device_of(context.settings.trainer))[
                judged
            ] / max(method.folds, 1)
            if method.trial == 1 and not method.folds and (found is None or badness(start) < badness(best)):
                best, found = start, tried
    best = min(method.starts, key=badness)
    set_random_state(kept)
    shown = ", ".join(f"{start} {figure:.4f}" for start, figure in figures.items())
    name = f"{judged} on {method.folds} unseen parts" if method.folds else f"training {judged}"
    context.console.line(f"seed {seed}  {method.name}  starts from {best!r}; {name} after a trial: {shown}")
    return best, found


def _trial_grounds(
    context: RunContext, method: Method, network: nn.Module, seed: int
) -> Iterator[tuple[RunContext, nn.Module]]:
    """The runs in which trials are made, one per fold, each with the dense network from which the trials start."""
    if not method.folds:
        yield context, network
    for index in range(method.folds):
        ground = context.on(Fold(context.task, index, method.folds), f"fold{index}")
        yield ground, network if method.start == "initial" else train_dense(ground, seed)
