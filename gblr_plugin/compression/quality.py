"""How good a compressed pretrained network is, beside the dense one, by the measure of its kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .inputs import IGNORED, Batch, Kind

__all__ = ["PERPLEXITIES", "Quality", "measure_quality", "perplexity"]

PERPLEXITIES: dict[Kind, str] = {"decoder": "perplexity", "masked": "masked perplexity"}
"""Name of the figure of kinds that are judged without a dense network to compare to."""


@dataclass(frozen=True)
class Quality:
    """A figure of the dense and of the compressed network.

    Args:
        metric: ``"perplexity"``, ``"masked perplexity"``, ``"cosine"`` (mean over samples, of the mean-pooled outputs,
            to those of the dense network) or ``"agreement"`` (share of samples whose top class is the dense network's).
        before: Of the dense network; 1 where it is what the compressed one is compared to.
        after: Of the compressed network.
        samples: Samples over which it was taken.
        others: More figures of both, by name: ``"nearest neighbours"``, the share of samples whose nearest other sample
            is the same as with the dense network's outputs.
    """

    metric: str
    before: float
    after: float
    samples: int
    others: dict[str, dict[str, float]] = field(default_factory=dict)


@torch.no_grad()
def measure_quality(kind: Kind, dense: nn.Module, compressed: nn.Module, batches: Sequence[Batch]) -> Quality:
    """Take the figure of a kind of network on held-out data.

    Args:
        kind: What the networks read.
        dense: In evaluation mode.
        compressed: The same.
        batches: As :class:`~gblr_plugin.compression.inputs.DataReader` makes them.

    Raises:
        ConfigError: If the network gives neither logits nor hidden states, or there is too little data.
    """
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    name = PERPLEXITIES.get(kind)
    if name is not None:
        return Quality(name, perplexity(kind, dense, batches), perplexity(kind, compressed, batches), samples)
    result = _result(dense, batches[0])
    if getattr(result, "logits", None) is not None:
        right = [_top(dense, batch) == _top(compressed, batch) for batch in batches]
        counted = torch.cat([same[_counted(same, batch)] for same, batch in zip(right, batches, strict=True)])
        return Quality("agreement", 1.0, float(counted.float().mean()), samples)
    if getattr(result, "last_hidden_state", None) is not None:
        reference, other = (
            torch.cat([_embedding(network, batch) for batch in batches]) for network in (dense, compressed)
        )
        cosine = float(F.cosine_similarity(reference, other).mean())
        same = {"before": 1.0, "after": _same_neighbours(reference, other)}
        others = {"nearest neighbours": same} if samples > 2 else {}
        return Quality("cosine", 1.0, cosine, samples, others)
    raise ConfigError(f"--eval: a {type(dense).__name__} gives neither logits nor hidden states to compare")


def _result(network: nn.Module, batch: Batch) -> Any:
    return network(**{name: tensor for name, tensor in batch.items() if name != "labels"})


@torch.no_grad()
def perplexity(kind: Kind, network: nn.Module, batches: Sequence[Batch]) -> float:
    """Exponential of the mean negative log likelihood of the tokens that count.

    Args:
        kind: One of :data:`PERPLEXITIES`.
        network: In evaluation mode.
        batches: With ``"labels"``.

    Raises:
        ConfigError: If no token counts.
    """
    loss, count = 0.0, 0
    for sample in _single(batches):
        logits, labels = _result(network, sample).logits, sample["labels"]
        if kind == "decoder":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
    if not count:
        raise ConfigError("--eval: no token to predict")
    return math.exp(min(loss / count, 700))


def _single(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Samples one by one: the logits of many over a large vocabulary would take gigabytes."""
    for batch in batches:
        for place in range(len(batch["input_ids"])):
            yield {name: tensor[place : place + 1] for name, tensor in batch.items()}


def _top(network: nn.Module, batch: Batch) -> Tensor:
    top: Tensor = _result(network, batch).logits.argmax(-1)
    return top


def _counted(same: Tensor, batch: Batch) -> Tensor:
    """Which entries count: all of samples, and of tokens those that are no padding."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == same.shape else torch.ones_like(same, dtype=torch.bool)


def _embedding(network: nn.Module, batch: Batch) -> Tensor:
    """(samples, features): hidden states averaged over tokens that are no padding, or over places of an image."""
    hidden: Tensor = _result(network, batch).last_hidden_state.float()
    if hidden.dim() == 4:  # (samples, features, rows, columns), of a convolutional network
        return hidden.mean((2, 3))
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weight = mask[..., None].to(hidden)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _same_neighbours(reference: Tensor, other: Tensor) -> float:
    nearest = []
    for embeddings in (reference, other):
        direction = F.normalize(embeddings)
        cosine = (direction @ direction.T).fill_diagonal_(-2.0)
        nearest.append(cosine.argmax(1))
    return float((nearest[0] == nearest[1]).float().mean())
