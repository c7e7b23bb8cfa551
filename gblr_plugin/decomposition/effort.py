"""The settings of the interval pursuit that decide its time and its result, and their defaults by metric and size."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem

__all__ = ["LARGE", "Effort", "default_effort", "default_shares"]

LARGE = 1 << 22
"""Entries of a matrix from which fewer rounds are made: each takes many seconds, and the last rounds gain least."""
MODEST = 1 << 18
"""Entries of a matrix up to which several shares of the low-rank part are tried in a metric of inputs."""


@dataclass(frozen=True)
class Effort:
    """How many rounds, sweeps and candidates the interval pursuit takes.

    Args:
        rank_share: Rank of the low-rank part over the rank that would cost the complete budget in trapezoid form.
            ``None``: 0.7, or 0.65 for large matrices, whose low-rank part is not turned into windows. In a metric of
            inputs the spectrum decays and little is left for blocks: small matrices take the best of 0.8, 0.9 and 1
            (at 1, blocks use the multiply-adds that are too few for one more rank), others take 0.9.
        rounds: Rounds, in each of which blocks are added.
        sweeps: Sweeps per round; each fits the factors and chooses new intervals.
        choices: Sweeps that choose intervals within the budget, after the low-rank part has become windows.
        polish: Last sweeps, which keep the intervals.
        renew: Share of the blocks that each round drops to add better ones.
        surplus: Number of blocks in the first round over that in the result; later rounds drop those of least gain.
        min_gain: First least gain per multiply-add over the mean square of the residual.
        overlap: Largest overlap of two blocks added in one round, relative to the smaller block.
        refine: Alternations on each candidate block before it is compared with the others.
        extra_candidates: Candidates beyond the blocks wanted; ``None``: twice as many. With tiles many of them overlap.
        momentum: Extrapolation of the column factors from sweep to sweep.
        tile_scale: Side of the smaller search tiles over (mean width of a component that the budget allows)^(3/4); the
            larger search tiles have twice that side.
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
    """The default settings for the metric and the size of a matrix."""
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
