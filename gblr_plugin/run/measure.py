"""Quality, size and latency of trained networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..utils.running import evaluating
from ..utils.timing import interleaved_medians

__all__ = ["METRICS", "evaluate", "interleaved_latency"]

METRICS = ("accuracy", "perplexity")


@contextmanager
def _placed(network: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """A network on a device, and afterwards on its own again; ``None``: it stays there."""
    parameter = next(network.parameters(), None)
    before = torch.device("cpu") if parameter is None else parameter.device
    device = before if device is None else device
    try:
        network.to(device)
        yield device
    finally:
        network.to(before)


@torch.no_grad()
def evaluate(network: nn.Module, batches: Any, metric: str, device: torch.device | None = None) -> dict[str, float]:
    """Loss and metric of a network over (input, target) batches.

    Args:
        network: Maps inputs to logits whose last dimension is the class.
        batches: An iterable of batches; targets of -100 do not count.
        metric: ``"accuracy"`` (percent) or ``"perplexity"``.
        device: Where to evaluate; default where the network is.

    Returns:
        ``loss`` (mean cross-entropy, nats per target) and the metric.

    Raises:
        ConfigError: If there is no batch.
    """
    loss, correct, count = 0.0, 0, 0
    with evaluating(network), _placed(network, device) as there:
        for x, target in batches:
            target = target.to(there)
            logits: Tensor = network(x.to(there))
            loss += float(F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum"))
            correct += int((logits.argmax(-1) == target).sum())
            count += int((target != -100).sum())  # what cross_entropy ignores
    if not count:
        raise ConfigError("data: no example to evaluate on")
    mean = loss / count
    value = 100 * correct / count if metric == "accuracy" else math.exp(min(mean, 700))
    return {"loss": mean, metric: value}


@torch.no_grad()
def interleaved_latency(networks: Mapping[str, nn.Module], x: Tensor, rounds: int = 30) -> dict[str, float]:
    """Median seconds of one forward pass of each network, measured turn by turn in one run.

    Args:
        networks: Networks by name; they are put in evaluation mode.
        x: Input of all networks.
        rounds: Turns that are counted, after three that are not.
    """
    for network in networks.values():
        network.eval()
    calls = [lambda network=network: network(x) for network in networks.values()]
    return dict(zip(networks, interleaved_medians(calls, x.device, least=rounds, warmup=3), strict=True))
