"""Fits the parameters of a compressed block by gradient, to what the dense block returns.

The block's structure is fixed. Its factors, biases and norms are moved so that the block, given the hidden states of
the compressed network, returns the hidden states of the dense one; what one-shot decompositions of single layers leave
is then shared among all layers of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.rates import WarmupCosine
from ..utils.validation import check_count, check_number
from .batches import Calibration
from .inputs import fitting_mask
from .streams import Stream

__all__ = ["Refinement", "refine"]


@dataclass(frozen=True)
class Refinement:
    """How blocks are refined.

    Args:
        steps: Steps of Adam for each block, each on one calibration batch; 0: none.
        lr: Largest learning rate; it falls to 0 along a cosine.
        seed: Seed of the order of the batches.
    """

    steps: int = 64
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("refine", self.steps, 0)
        check_number("refine: learning rate", self.lr, "(0, inf)")


def refine(
    stream: Stream,
    targets: Sequence[Tensor],
    calibration: Calibration,
    settings: Refinement,
    *,
    fixed: Iterable[nn.Parameter] = (),
) -> tuple[float, float]:
    """Fit the block that a stream passes next to the dense block's hidden states.

    The loss is the mean squared error of the hidden state after the block over positions that are not padding. The
    block is left as it was if the error over all batches does not fall.

    Args:
        stream: Hidden states of the compressed network before the block. Its block changes.
        targets: Hidden states after the dense block, by batch.
        calibration: The batches, which say what padding is.
        settings: Steps and learning rate.
        fixed: Parameters that are not to change, such as those that other blocks hold too.

    Returns:
        The error of the block's hidden states before and after, each over the mean square of the targets' deviations.
    """
    block, kept = stream.block, {id(parameter) for parameter in fixed}
    trained = [p for p in block.parameters() if p.is_floating_point() and id(p) not in kept]
    masks = [
        fitting_mask(calibration.valid(batch), target)
        for batch, target in zip(calibration.batches, targets, strict=True)
    ]
    scale = _energy(targets, masks)
    before = _error(stream, targets, masks) / scale
    if not settings.steps or not trained or not before > 0:
        return before, before
    old = [parameter.detach().clone() for parameter in trained]
    with _training(trained), torch.enable_grad():
        optimizer = torch.optim.Adam(trained, lr=settings.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(settings.steps, 0.0))
        for batch in _order(len(targets), settings):
            optimizer.zero_grad()
            loss = _squares(stream.run(batch), targets[batch], masks[batch]) / scale
            loss.backward()
            optimizer.step()
            schedule.step()
    after = _error(stream, targets, masks) / scale
    if after < before:  # false of NaN too
        return before, after
    with torch.no_grad():
        for parameter, value in zip(trained, old, strict=True):
            parameter.copy_(value)
    return before, before


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context the parameters have gradients."""
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _order(batches: int, settings: Refinement) -> Iterator[int]:
    """Numbers of batches, each as often as the others, in drawn orders."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn: list[int] = []
    for _ in range(settings.steps):
        drawn = drawn or torch.randperm(batches, generator=generator).tolist()
        yield drawn.pop()


def _squares(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over the positions that count."""
    error = (output - target).float().square()
    if mask is None:
        return error.mean()
    weight = (mask != 0).to(error)[..., None]
    return (error * weight).sum() / (weight.sum() * error.shape[-1]).clamp(min=1)


@torch.no_grad()
def _error(stream: Stream, targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> float:
    errors: list[Any] = [
        _squares(stream.run(batch), target, mask)
        for batch, (target, mask) in enumerate(zip(targets, masks, strict=True))
    ]
    return float(torch.stack(errors).mean())


@torch.no_grad()
def _energy(targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> float:
    """Mean square of the targets' deviations from their mean over positions."""
    rows = [
        target.flatten(0, -2) if mask is None else target[mask != 0]
        for target, mask in zip(targets, masks, strict=True)
    ]
    count = sum(len(values) for values in rows)
    mean = torch.stack([values.sum(0) for values in rows]).sum(0) / max(count, 1)
    squares = torch.stack([(values - mean).float().square().sum() for values in rows]).sum()
    return max(float(squares) / max(count * len(mean), 1), 1e-30)
