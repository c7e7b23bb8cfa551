"""Goals of layers."""

import math

import pytest

from gblr_plugin.errors import ConfigError
from gblr_plugin.learning.goals import LayerGoal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a budget or a fixed threshold"),
        ({"budget": 0.5, "threshold": 0.1}, "not both"),
        ({"budget": 0.0}, r"in \(0, 1\], got 0\.0"),
        ({"budget": 1.5}, "got 1.5"),
        ({"budget": math.nan}, "got nan"),
        ({"threshold": -1.0}, "at least 0"),
        ({"threshold": math.nan}, "finite"),
        ({"budget": 0.5, "min_flops": 0.6, "max_flops": 0.5}, "exceeds max_flops"),
        ({"budget": 0.5, "min_flops": -0.1}, "min_flops"),
        ({"budget": 0.5, "max_flops": math.nan}, "max_flops"),
        ({"budget": "half"}, "budget must be a number, got 'half'"),
    ],
)
def test_bad_goals_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LayerGoal(**options)
