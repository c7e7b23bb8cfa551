"""The private names of Lightning 2.6 that this bridge reads, in one place; each function says what it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = [
    "averages_weights",
    "drop_batches",
    "is_driven_by_nni",
    "loaded_checkpoint",
    "loaders_of",
    "schedulers_of",
    "shards_parameters",
    "start_loaders",
    "state_key",
    "takes_pictures",
]

_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def averages_weights(callback: Any) -> str | None:
    """Its name, where a callback is one of Lightning's that put an average of the weights in their place.

    By name, since ``lightning`` and ``pytorch_lightning`` have classes of their own.
    """
    return type(callback).__name__ if _AVERAGING & {kind.__name__ for kind in type(callback).__mro__} else None


def shards_parameters(trainer: Any) -> str | None:
    """Its name, where a Trainer's strategy shards parameters out of sight of callbacks."""
    name = type(trainer.strategy).__name__
    return name if name in _SHARDED else None


def is_driven_by_nni(layer: nn.Module) -> bool:
    """Whether one of NNI's compressors has wrapped a layer."""
    return hasattr(layer, "_nni_wrapper")


def loaded_checkpoint(trainer: Any) -> dict[str, Any]:
    """The checkpoint that a Trainer restores at present, before callbacks are given it; otherwise empty."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector._loaded_checkpoint
    return checkpoint


def schedulers_of(trainer: Any) -> list[Any]:
    """The learning rate schedulers of a Trainer, and those inside SequentialLR and ChainedScheduler."""

    def flat(schedulers: Iterable[Any]) -> Iterable[Any]:
        for scheduler in schedulers:
            yield scheduler
            yield from flat(getattr(scheduler, "_schedulers", ()))

    return list(flat(config.scheduler for config in trainer.lr_scheduler_configs))


def loaders_of(trainer: Any) -> list[Any]:
    """The training loaders at work."""
    return list(trainer.fit_loop._combined_loader.flattened)


def start_loaders(trainer: Any) -> None:
    """Start the training loaders anew."""
    iter(trainer.fit_loop._data_fetcher)


def drop_batches(trainer: Any, count: int) -> None:
    """Fetch so many batches of the started loaders and drop them; start the loaders anew if they have fewer."""
    fetcher = trainer.fit_loop._data_fetcher
    source = getattr(fetcher, "iterator_wrapper", fetcher)  # the wrapper: modules that fetch batches themselves
    try:
        for _ in range(count):
            next(source)
    except StopIteration:
        iter(fetcher)
    else:
        fetcher.fetched -= count  # Lightning adds those of the unfinished epoch


def state_key(callback: Any, **about: Any) -> str:
    """The key of a callback's state in checkpoints where several of its type are told apart by ``about``."""
    key: str = callback._generate_state_key(**about)
    return key


def takes_pictures(logger: Any) -> str | None:
    """How a logger takes pictures: ``"log_image"`` (Weights & Biases), ``"add_image"`` of its experiment, or not."""
    if callable(getattr(logger, "log_image", None)):
        return "log_image"
    return "add_image" if callable(getattr(getattr(logger, "experiment", None), "add_image", None)) else None
