"""Intervals for given gains: at a price of a multiply-add, or at the price at which all together meet a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..matrix.tiles import TiledAxis
from .spans import Spans, best_spans

__all__ = ["Choice", "choose", "choose_within"]

CHEAPER = 16
"""Cuts of the price, by a third each, that are tried where the intervals cost less than the budget."""
PRICES = 10
"""Prices tried between one that is too low and one that is not."""
NEAR = 2e-4
"""Share of the budget that may be left."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The intervals of K components along one axis, chosen at a price.

    Args:
        spans: K intervals.
        worth: (K,) gain of each component less what its multiply-adds, on both axes, are priced at.
        price: Squared error that one multiply-add must save.
        cost: Multiply-adds of the components of positive worth, and of what else is paid from the budget.
    """

    spans: Spans
    worth: Tensor
    price: float
    cost: int


def choose(gains: Tensor, grid: TiledAxis, other: Tensor, price: float, spent: int = 0) -> Choice:
    """For each component the interval of largest gain less price.

    Args:
        gains: (K, cells) gain of covering each cell.
        grid: The axis.
        other: (K,) widths on the other axis.
        price: Squared error that one multiply-add must save.
        spent: Multiply-adds that are paid from the budget besides.
    """
    spans, net = best_spans(gains, grid, price)
    worth = net - price * other
    return Choice(spans, worth, price, spent + int(((spans.widths() + other) * (worth > 0)).sum()))


def choose_within(
    gains: Tensor, grid: TiledAxis, other: Tensor, price: float, spent: int, max_multiply_adds: int
) -> Choice:
    """As :func:`choose`, at the lowest price found at which the cost is within a budget of multiply-adds.

    The search starts from ``price``.
    """

    def at(price: float) -> Choice:
        return choose(gains, grid, other, price, spent)

    over, within = _enclosed(at, price, max_multiply_adds)
    for step in range(PRICES):
        if within.cost >= (1 - NEAR) * max_multiply_adds or over.cost <= max_multiply_adds:
            break
        share = (over.cost - max_multiply_adds) / (over.cost - within.cost) if step % 2 else 0.5
        trial = at(over.price * (within.price / over.price) ** min(max(share, 0.05), 0.95))
        over, within = (trial, within) if trial.cost > max_multiply_adds else (over, trial)
    return within


def _enclosed(at: Callable[[float], Choice], price: float, max_multiply_adds: int) -> tuple[Choice, Choice]:
    """A choice above the budget and one within it; both within it where no price tried exceeds it."""
    over = within = at(price)
    while within.cost > max_multiply_adds:
        over, within = within, at(within.price * 1.3)
    if over is within:
        for _ in range(CHEAPER):  # what is left of the budget buys wider intervals
            over = at(over.price / 1.5)
            if over.cost > max_multiply_adds:
                break
            within = over
    return over, within
