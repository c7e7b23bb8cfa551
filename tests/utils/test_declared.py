from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from gblr_plugin import ConfigError
from gblr_plugin.utils.declared import Integer, Interval, OneOf, check_declared


@dataclass
class Settings:
    rate: Annotated[float, Interval("(0, inf)")] = 0.1
    share: Annotated[float, Interval("(0, 1]", "a share of the steps")] = 0.5
    count: Annotated[int, Integer(1, 8)] | None = None
    least: Annotated[int, Integer(2)] = 2
    kind: Annotated[str, OneOf(("new", "old"))] = "new"
    sizes: list[Annotated[int, Integer(1)]] = field(default_factory=lambda: [1])
    anything: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_declared(self)


def test_values_in_range_pass():
    Settings(rate=5.0, share=1.0, count=8, sizes=[3, 4], anything={"a": -1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"share": 0.0}, r"share must be a share of the steps in \(0, 1\], got 0.0"),
        ({"count": 9}, "count must be a whole number from 1 to 8, got 9"),
        ({"count": True}, "count must be a whole number from 1 to 8, got True"),
        ({"least": 1}, "least must be a whole number of at least 2, got 1"),
        ({"kind": "odl"}, "kind must be one of new, old, got 'odl'; did you mean 'old'"),
        ({"sizes": [1, 0]}, "sizes must be a whole number of at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("bound", "schema"),
    [
        (Interval("[0, 1)"), {"minimum": 0, "exclusiveMaximum": 1}),
        (Interval("(0, inf)"), {"exclusiveMinimum": 0}),
        (Interval("(0, 1]"), {"exclusiveMinimum": 0, "maximum": 1}),
        (Integer(1, 8), {"minimum": 1, "maximum": 8}),
        (Integer(0), {"minimum": 0}),
        (OneOf(("a", "b")), {"enum": ["a", "b"]}),
    ],
)
def test_schemas(bound, schema):
    assert bound.to_schema() == schema
