"""The one loop that times calls against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["interleaved_medians"]

_MOST_ROUNDS = 50


def interleaved_medians(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float = 0.0,
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    pick: Callable[[list[float]], float] = statistics.median,
    warmup: int = 1,
) -> list[float]:
    """Median time of each call, in seconds; the calls take turns, so that drifts of the machine meet all of them.

    Args:
        calls: What to time.
        device: Where the calls work; a call ends when a CUDA device has done its work.
        seconds: About how long to spend on each call, in at most 50 rounds.
        least: Smallest number of rounds.
        clock: Where the time comes from; ``time.process_time`` where others use the processor too.
        pick: What to take of each call's times in place of their median.
        warmup: How often each call is made beforehand, without a count.
    """

    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    for _ in range(warmup):
        for call in calls:
            timed(call)
    times = [[timed(call)] for call in calls]
    rounds = max(least, min(_MOST_ROUNDS, int(seconds / max(statistics.fmean(t[0] for t in times), 1e-9))))
    for _ in range(rounds - 1):
        for call, taken in zip(calls, times, strict=True):
            taken.append(timed(call))
    return [pick(taken) for taken in times]
