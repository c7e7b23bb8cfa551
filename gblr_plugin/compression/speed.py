"""How fast a compressed pretrained network is beside the dense one: both in turns, at one sample and at more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..huggingface.pretrained import decode
from ..utils.timing import interleaved_medians
from .inputs import Batch, Kind

__all__ = ["Speed", "measure_speed"]

_MANY = {"masked": 64, "encoder": 64, "images": 8}
_DECODED = 16  # tokens that are decoded in one turn


@dataclass(frozen=True)
class Speed:
    """Times of the dense and of the compressed network.

    Args:
        items: What is counted: ``"texts"``, ``"images"``, or ``"tokens"``, of which one is decoded with the cache of
            those before it, and more are read at once.
        dense: Median seconds by how many there are.
        compressed: The same.
    """

    items: str
    dense: dict[int, float]
    compressed: dict[int, float]

    @property
    def speedup(self) -> dict[int, float]:
        """How many times faster the compressed network is."""
        return {count: seconds / self.compressed[count] for count, seconds in self.dense.items()}


@torch.no_grad()
def measure_speed(
    kind: Kind, dense: nn.Module, compressed: nn.Module, batches: Sequence[Batch], seconds: float = 5.0
) -> Speed:
    """Time both networks on a user's own data, turn by turn.

    Args:
        kind: What the networks read.
        dense: In evaluation mode.
        compressed: The same.
        batches: As :class:`~gblr_plugin.compression.inputs.DataReader` makes them.
        seconds: About how long to spend on each network and number of samples.
    """
    networks, device = (dense, compressed), next(dense.parameters()).device
    calls: dict[int, list[Callable[[], object]]] = {}
    if kind == "decoder":
        ids = batches[0]["input_ids"][:1]
        few = ids[:, :_DECODED]
        calls = {1: [partial(decode, network, few) for network in networks]}
        calls[ids.shape[1]] = [partial(_forward, network, {"input_ids": ids}) for network in networks]
    else:
        held = sum(len(next(iter(batch.values()))) for batch in batches)
        for count in sorted({1, min(_MANY[kind], held)}):
            calls[count] = [partial(_forward, network, _first(batches, count)) for network in networks]
    found = {count: interleaved_medians(turns, device, seconds, least=5) for count, turns in calls.items()}
    if kind == "decoder":
        found[1] = [taken / few.shape[1] for taken in found[1]]
    items = {"decoder": "tokens", "images": "images"}.get(kind, "texts")
    return Speed(items, *({count: times[place] for count, times in found.items()} for place in (0, 1)))


def _forward(network: Callable[..., Any], batch: Batch) -> None:
    network(**batch)


def _first(batches: Sequence[Batch], count: int) -> Batch:
    """So many samples as one batch: of the middle of the data, where texts have a usual length."""
    batch = {name: tensor for name, tensor in batches[len(batches) // 2].items() if name != "labels"}
    held = len(next(iter(batch.values())))
    rows = torch.arange(count) % held
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    mask = batch.get("attention_mask")
    if mask is not None:  # without columns in which all is padding
        used = mask.any(0)
        batch = {name: tensor[:, used] if tensor.shape == mask.shape else tensor for name, tensor in batch.items()}
    return batch
