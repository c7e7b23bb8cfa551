"""Chooses intervals by their gains, with a given least gain per multiply-add, or with the one that meets a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..matrix.tiles import TiledAxis
from .spans import Spans, best_spans

__all__ = ["Choice", "choose", "choose_within"]

CUTS = 16
"""Cuts of the least gain, by a third each, that are tried where the intervals cost less than the budget."""
TRIALS = 10
"""Least gains tried between one that is too low and one that is not."""
NEAR = 2e-4
"""Share of the budget that may be left."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The intervals of K components along one axis, chosen by their gains.

    Args:
        spans: K intervals.
        net_gain: (K,) gain of each component, less ``min_gain`` times its multiply-adds (both widths).
        min_gain: Squared error that one multiply-add must save.
        cost: Multiply-adds of the components of positive net gain, plus those spent on other components.
    """

    spans: Spans
    net_gain: Tensor
    min_gain: float
    cost: int


def choose(gains: Tensor, grid: TiledAxis, other: Tensor, min_gain: float, spent: int = 0) -> Choice:
    """For each component the interval of largest net gain.

    Args:
        gains: (K, cells) gain of covering each cell.
        grid: The axis.
        other: (K,) widths on the other axis.
        min_gain: Squared error that one multiply-add must save.
        spent: Multiply-adds of other components, which :attr:`Choice.cost` includes.
    """
    spans, net = best_spans(gains, grid, min_gain)
    net_gain = net - min_gain * other
    return Choice(spans, net_gain, min_gain, spent + int(((spans.widths() + other) * (net_gain > 0)).sum()))


def choose_within(
    gains: Tensor, grid: TiledAxis, other: Tensor, min_gain: float, spent: int, max_multiply_adds: int
) -> Choice:
    """As :func:`choose`, with the lowest least gain found at which the cost is at most ``max_multiply_adds``.

    The search for that least gain starts from ``min_gain``.
    """

    def at(min_gain: float) -> Choice:
        return choose(gains, grid, other, min_gain, spent)

    over, within = _enclosed(at, min_gain, max_multiply_adds)
    for step in range(TRIALS):
        if within.cost >= (1 - NEAR) * max_multiply_adds or over.cost <= max_multiply_adds:
            break
        share = (over.cost - max_multiply_adds) / (over.cost - within.cost) if step % 2 else 0.5
        trial = at(over.min_gain * (within.min_gain / over.min_gain) ** min(max(share, 0.05), 0.95))
        over, within = (trial, within) if trial.cost > max_multiply_adds else (over, trial)
    return within


def _enclosed(at: Callable[[float], Choice], min_gain: float, max_multiply_adds: int) -> tuple[Choice, Choice]:
    """(a choice above the budget, a choice within it); both are within it if no least gain tried exceeds it."""
    over = within = at(min_gain)
    while within.cost > max_multiply_adds:
        over, within = within, at(within.min_gain * 1.3)
    if over is within:
        for _ in range(CUTS):  # the budget allows wider intervals: lower the least gain
            over = at(over.min_gain / 1.5)
            if over.cost > max_multiply_adds:
                break
            within = over
    return over, within
