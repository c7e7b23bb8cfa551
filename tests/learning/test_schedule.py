from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest

from gblr_plugin.errors import ConfigError
from gblr_plugin.learning.schedule import Schedule


def test_published_homotopy():
    # 110 epochs, 5 warm-up, 10 cool-down: sigma 1 until epoch 5, linear to 100 at epoch 100.
    schedule = Schedule(5, 100)
    sigma = [schedule.sigma(schedule.progress(epoch)) for epoch in range(111)]
    assert sigma[:6] == [1.0] * 6
    assert sigma[100:] == [100.0] * 11
    steps = [b - a for a, b in pairwise(sigma[5:101])]
    assert steps == pytest.approx([99 / 95] * 95)


def test_ramp_is_cubic_and_monotone():
    values = [Schedule.ramp(i / 20) for i in range(21)]
    assert (values[0], values[10], values[20]) == (0.0, 1 - 0.5**3, 1.0)
    assert values == sorted(values)


def test_no_warmup():
    schedule = Schedule(0, 1)
    assert schedule.progress(0) == 0.0
    assert schedule.progress(1) == schedule.progress(7) == 1.0


@pytest.mark.parametrize(("warmup", "cooldown"), [(-1, 5), (5, 5), (6, 5)])
def test_bad_steps_are_refused(warmup, cooldown):
    with pytest.raises(ConfigError, match="warmup_step < cooldown_begin_step"):
        Schedule(warmup, cooldown)


@pytest.mark.parametrize(("start", "end"), [(0, 100), (-1, 5), (10, 5), (float("nan"), 5)])
def test_bad_sigmas_are_refused(start, end):
    with pytest.raises(ConfigError, match="sigma_start"):
        Schedule(0, 5, start, end)


def test_one_smoothness_throughout_and_a_ramp_of_any_schedule():
    schedule = Schedule(1, 3, 100.0, 100.0)
    assert schedule.sigma(0.0) == schedule.sigma(1.0) == 100.0
    assert schedule.ramp(0.5) == Schedule.ramp(0.5)
    with pytest.raises(FrozenInstanceError):
        schedule.sigma_end = 5.0


@pytest.mark.parametrize("values", [("1", 2), (1, None), (0, 1, "a"), (0, True)])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ConfigError, match=r"schedule: .* must be a number, got"):
        Schedule(*values)
