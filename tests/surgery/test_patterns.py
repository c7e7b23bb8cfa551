import pytest
from torch import nn

from gblr_plugin import ConfigError, GBLRLinear
from gblr_plugin.surgery.patterns import as_patterns, check_used, matches, value_of


class Mine(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("blocks.0.fc1", nn.Linear(2, 2), True),
        ("blocks.*", nn.Linear(2, 2), True),
        ("blocks.?.fc2", nn.Linear(2, 2), False),
        ("fc1", nn.Linear(2, 2), False),
        ("Linear", nn.Linear(2, 2), True),
        ("Linear", Mine(2, 2), True),
        ("Mine", nn.Linear(2, 2), False),
        ("linear", nn.Linear(2, 2), False),
        ("Linear", nn.Conv1d(2, 2, 1), False),
    ],
)
def test_names_globs_and_types_with_subclasses(pattern, module, expected):
    assert matches(pattern, "blocks.0.fc1", module) is expected


def test_structured_layers_are_linear_layers_too():
    assert issubclass(GBLRLinear, nn.Linear)


def test_types_stand_for_their_names():
    assert as_patterns("layers", [nn.Linear, "fc*"]) == ["Linear", "fc*"]
    for one in ("fc1", nn.Linear):
        with pytest.raises(ConfigError, match="layers is a list of names, glob patterns or types, not one of them"):
            as_patterns("layers", one)


def test_the_first_pattern_that_matches_gives_the_value():
    table = {"*.qkv": 3, "Conv1d": 2}
    assert value_of(table, "a.qkv", nn.Conv1d(2, 2, 1), 1) == 3
    assert value_of(table, "a", nn.Conv1d(2, 2, 1), 1) == 2
    assert value_of(table, "a", nn.Linear(2, 2), 1) == 1
    assert value_of(4, "a", nn.Linear(2, 2), 1) == 4


def test_an_unused_pattern_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="row_splits: pattern 'fc2' matches no chosen layer; did you mean 'fc1'"):
        check_used("row_splits", ["fc2"], {"fc1": nn.Linear(2, 2)}, "chosen layer")
