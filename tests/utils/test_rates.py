from itertools import pairwise

import pytest

from gblr_plugin.utils.rates import WarmupCosine


def test_learning_rate_rises_then_falls_to_zero():
    factor = WarmupCosine(100, 0.1)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(values[:11]))
    assert max(values) == values[10] == 1.0
    assert all(a > b for a, b in pairwise(values[10:]))
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert WarmupCosine(1, 0.0)(0) <= 1.0
