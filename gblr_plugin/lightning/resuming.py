"""Random numbers and the position in the data, which Lightning's checkpoints leave out."""

from __future__ import annotations

from typing import Any

import torch

from ..utils.random_state import random_state, set_random_state
from ._compat import drop_batches, loaders_of, start_loaders

__all__ = ["DataPosition"]


class DataPosition:
    """Where a training stands in its data, and with which random numbers; each process for itself.

    Kept are the random state with which the loaders of this epoch were started, how many batches they have given, and
    the random state now. To go on, the loaders are started alike, and as many batches are dropped. Loaders with a
    ``state_dict`` of their own, which Lightning restores, are left alone.

    Args:
        replay: Whether batches that an unfinished epoch has had are fetched again and dropped.
    """

    def __init__(self, replay: bool = True) -> None:
        self._replay = replay
        self._restored: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None
        self._all: list[dict[str, Any]] = []

    def state(self, trainer: Any) -> list[dict[str, Any]]:
        """Of a checkpoint taken now, between two batches: one for each process, all of which call this.

        Empty before fitting.
        """
        if self._begun is None:
            return []
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        now = random_state()
        if done and progress.is_last_batch:  # the next thing is the next epoch
            state = {**self._epoch(trainer, trainer.current_epoch + 1, now), "batches": 0, "random": now}
        else:
            state = {**self._begun, "batches": done, "random": now}
        if trainer.world_size == 1:
            return [state]
        everyone = [state] * trainer.world_size
        torch.distributed.all_gather_object(everyone, state)
        return everyone

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Go on from there in the next fit, if that has as many processes."""
        self._all = states

    def fit_begins(self, trainer: Any) -> None:
        """Before loaders are asked for and started."""
        self._restored = self._all[trainer.global_rank] if len(self._all) == trainer.world_size else None
        self._all = []
        if self._restored is None:
            self._begun = {"epoch": trainer.current_epoch, "start": random_state(), "generators": None}
            return
        self._begun = {name: self._restored[name] for name in ("epoch", "start", "generators")}
        set_random_state(self._begun["start"])

    def training_begins(self, trainer: Any) -> None:
        """After loaders were started for the first time, and before the first batch."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        if self._replay and not any(hasattr(loader, "load_state_dict") for loader in loaders_of(trainer)):
            self._start_again(trainer)
            drop_batches(trainer, restored["batches"])
        if restored["batches"]:
            set_random_state(restored["random"])

    def epoch_begins(self, trainer: Any) -> None:
        """Before the loaders are started for an epoch; not called for one that goes on."""
        if self._begun is not None and trainer.current_epoch != self._begun["epoch"]:
            self._begun = self._epoch(trainer, trainer.current_epoch, random_state())

    def _start_again(self, trainer: Any) -> None:
        assert self._begun is not None
        if self._begun["generators"] is None:  # the first epoch of a fit, whose loaders are as they were made
            return
        set_random_state(self._begun["start"])
        loaders = loaders_of(trainer)
        for generator, state in zip(_generators(loaders), self._begun["generators"], strict=False):
            generator.set_state(state.cpu())
        for loader in loaders:
            for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                if sampler is not None and hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(trainer.current_epoch)
        start_loaders(trainer)

    @staticmethod
    def _epoch(trainer: Any, number: int, start: dict[str, Any]) -> dict[str, Any]:
        generators = [generator.get_state() for generator in _generators(loaders_of(trainer))]
        return {"epoch": number, "start": start, "generators": generators}


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """Of the loaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
