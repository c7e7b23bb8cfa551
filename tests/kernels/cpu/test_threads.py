"""Parts of a work on several threads."""

from __future__ import annotations

import time

import pytest

from gblr_plugin.kernels.cpu.threads import run_shares


@pytest.mark.parametrize("failing", [0, 1])
def test_all_parts_are_done_when_one_fails(failing: int) -> None:
    done = []

    def work(part: int) -> None:
        if part == failing:
            raise KeyboardInterrupt
        time.sleep(0.05)
        done.append(part)

    with pytest.raises(KeyboardInterrupt):
        run_shares(work, range(3))
    assert sorted(done) == [part for part in range(3) if part != failing]


@pytest.mark.parametrize("parts", [range(1), range(4)])
def test_each_part_is_done_once(parts: range) -> None:
    done: list[int] = []
    run_shares(done.append, parts)
    assert sorted(done) == list(parts)
