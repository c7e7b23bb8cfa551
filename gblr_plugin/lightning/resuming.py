"""Random numbers and the place in the data, which Lightning's checkpoints leave out."""

from __future__ import annotations

from typing import Any

import torch

from ..utils.random_state import random_state, set_random_state

__all__ = ["Place"]


class Place:
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
            own = {**self._epoch(trainer, trainer.current_epoch + 1, now), "batches": 0, "random": now}
        else:
            own = {**self._begun, "batches": done, "random": now}
        if trainer.world_size == 1:
            return [own]
        everyone = [own] * trainer.world_size
        torch.distributed.all_gather_object(everyone, own)
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
        loaders = trainer.fit_loop._combined_loader.flattened
        if self._replay and not any(hasattr(loader, "load_state_dict") for loader in loaders):
            self._start_again(trainer.fit_loop, trainer.current_epoch, restored["batches"])
        if restored["batches"]:
            set_random_state(restored["random"])

    def epoch_begins(self, trainer: Any) -> None:
        """Before the loaders are started for an epoch; not called for one that goes on."""
        if self._begun is not None and trainer.current_epoch != self._begun["epoch"]:
            self._begun = self._epoch(trainer, trainer.current_epoch, random_state())

    def _start_again(self, loop: Any, epoch: int, batches: int) -> None:
        assert self._begun is not None
        fetcher, loaders = loop._data_fetcher, loop._combined_loader.flattened
        if self._begun["generators"] is not None:  # not the first epoch of a fit, whose loaders are as they were made
            set_random_state(self._begun["start"])
            for generator, state in zip(_generators(loaders), self._begun["generators"], strict=False):
                generator.set_state(state.cpu())
            for loader in loaders:
                for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                    if sampler is not None and hasattr(sampler, "set_epoch"):
                        sampler.set_epoch(epoch)
            iter(fetcher)
        source = getattr(fetcher, "iterator_wrapper", fetcher)  # the wrapper: modules that fetch batches themselves
        try:
            for _ in range(batches):
                next(source)
        except StopIteration:  # the data are others, and fewer
            iter(fetcher)
        else:
            fetcher.fetched -= batches  # Lightning adds them

    @staticmethod
    def _epoch(trainer: Any, number: int, start: dict[str, Any]) -> dict[str, Any]:
        generators = _generators(trainer.fit_loop._combined_loader.flattened)
        return {"epoch": number, "start": start, "generators": [one.get_state() for one in generators]}


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """Of the loaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
