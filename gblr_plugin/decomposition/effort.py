"""How much the interval pursuit tries, and what it tries by default for a metric and a size."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem

__all__ = ["LARGE", "Effort", "default_effort", "default_shares"]

LARGE = 1 << 22
"""Entries from which fewer rounds are made: each takes many seconds, and the last ones gain least."""
MODEST = 1 << 18
"""Entries up to which several shares of the low-rank part are tried in a metric."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        rank_share: Rank of the low-rank part over the rank of the trapezoids that cost the budget; ``None``: 0.7, or
            0.65 for large matrices, whose low-rank part stays. In a metric, where the spectrum decays and little is
            left for local blocks, the best of 0.8, 0.9 and 1, where blocks use what whole ranks leave of the budget;
            0.9 for matrices that are not small.
        rounds: Times that blocks are added.
        sweeps: Fits with a new choice of intervals after each, a round.
        choices: Choices of intervals within the budget, once the low-rank part has become components.
        polish: Last fits on fixed intervals.
        renew: Share of the components that each round gives up for better ones.
        surplus: Components of the first round over those of the result; those of least net gain leave round by round.
        min_gain: First least gain per multiply-add over the mean square of the residual.
        overlap: Largest overlap of blocks added together, relative to the smaller.
        refine: Alternations on each candidate block before it is compared with the others.
        extra_candidates: Candidates beyond the blocks wanted; ``None``: twice as many. On tiles many of them collide.
        momentum: Extrapolation of the column factors from sweep to sweep.
        tile_scale: Side of the smaller tiles searched over (mean width of a component that the budget allows)^(3/4);
            the larger ones have twice that side.
    """

    rank_share: float | None = None
    rounds: int = 5
    sweeps: int = 4
    choices: int = 7
    polish: int = 6
    renew: float = 0.05
    surplus: float = 1.3
    min_gain: float = 2.0
    overlap: float = 0.5
    refine: int = 2
    extra_candidates: int | None = None
    momentum: float = 0.8
    tile_scale: float = 0.8


BRISK = Effort(rounds=6, sweeps=2, polish=4, renew=0.1, surplus=1.0, momentum=0.5)
"""Fewer sweeps, more renewal."""
PLAIN = Effort(rounds=8, polish=4)
"""More rounds, where the low-rank part stays and is not followed by many choices of intervals."""


def default_effort(problem: Problem) -> Effort:
    """What is tried by default, by metric and size."""
    if problem.metric.root is not None:  # little is left for blocks, and each sweep takes longer
        return BRISK
    if problem.weight.numel() >= LARGE:
        return Effort(rounds=3, sweeps=2, polish=2)
    if problem.trains or not (problem.rows.cyclic or problem.cols.cyclic):
        return PLAIN
    return Effort(extra_candidates=None if max(problem.rows.tile, problem.cols.tile) > 1 else 300)


def default_shares(problem: Problem) -> list[float]:
    """Shares of the low-rank part that are tried by default."""
    size = problem.weight.numel()
    if problem.metric.root is not None:
        return [0.8, 0.9, 1.0] if size < MODEST else [0.9]
    values = problem.triplets[1]
    # A singular matrix may be made of blocks alone.
    singular = [0.0] if bool(values[-1] <= 1e-6 * values[0]) else []
    return [0.7 if size < LARGE else 0.65, *singular]
