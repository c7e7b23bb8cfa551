"""Calls are timed in turns."""

from __future__ import annotations

import torch

from gblr_plugin.utils.timing import interleaved_medians


def test_interleaved_medians_call_in_turns() -> None:
    order: list[int] = []
    times = interleaved_medians([lambda: order.append(0), lambda: order.append(1)], torch.device("cpu"), 0.0, least=3)
    assert order == [0, 1] * 4
    assert all(time > 0 for time in times)


def test_interleaved_medians_take_the_clock_they_are_given() -> None:
    ticks = iter(range(1000))
    times = interleaved_medians(
        [lambda: next(ticks), lambda: None], torch.device("cpu"), 0.0, clock=lambda: next(ticks)
    )
    assert times == [2, 1]
