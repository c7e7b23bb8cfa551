"""Checks of arguments: what passes, and the one line of what does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.utils import validation as v


def test_what_is_allowed_passes() -> None:
    v.check_choice("method", "svd", ("svd", "gblr"))
    v.check_share("budget", 1)
    v.check_count("batches", 0, least=0)
    v.check_flag("loss", False)
    v.check_row_splits("row_splits", 3, 9)
    v.check_weight("weight", torch.ones(2, 3, dtype=torch.bfloat16))
    assert v.check_tile("align", 4) == (4, 4)
    assert v.check_tile("align", [2, 8]) == (2, 8)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a name with a slip": (
        lambda: v.check_choice("f: method", "svb", ("svd", "gblr")),
        "f: method must be one of svd, gblr, got 'svb'; did you mean 'svd'?",
    ),
    "a name that is like none": (
        lambda: v.check_choice("f: method", "pca", ("svd", "gblr")),
        "f: method must be one of svd, gblr, got 'pca'",
    ),
    "a list as a name": (lambda: v.check_choice("m", ["svd"], ("svd",)), "m must be one of svd, got ['svd']"),
    "no share": (lambda: v.check_share("b", 0.0, "relative FLOPs"), "b must be relative FLOPs in (0, 1], got 0.0"),
    "a true share": (lambda: v.check_share("budget", True), "budget must be a number in (0, 1], got True"),
    "a share that is no number": (lambda: v.check_share("b", math.nan), "b must be a number in (0, 1], got nan"),
    "half a batch": (lambda: v.check_count("batches", 0.5), "batches must be a whole number of at least 1, got 0.5"),
    "a flag in words": (lambda: v.check_flag("loss", "no"), "loss must be true or false, got 'no'"),
    "three tiles": (
        lambda: v.check_tile("align", (1, 2, 3)),
        "align must be a positive int or a pair (rows, columns) of them, got (1, 2, 3)",
    ),
    "splits of half a row": (
        lambda: v.check_row_splits("row_splits", 2, 9),
        "row_splits must be a positive divisor of the 9 rows, got 2",
    ),
    "a vector": (
        lambda: v.check_weight("weight", torch.ones(3)),
        "weight must be a non-empty 2-d floating-point tensor of rows and columns, got torch.float32 (3,)",
    ),
    "infinity": (lambda: v.check_weight("weight", torch.tensor([[math.inf]])), "weight holds NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_allowed_is_refused_in_one_line(case: str) -> None:
    check, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        check()
    assert str(caught.value) == message


def test_the_nearest_word_is_found_whatever_its_case() -> None:
    assert v.did_you_mean("tpe", ["TPE", "Random"]) == "; did you mean 'TPE'?"
    assert v.did_you_mean("x", ["TPE", "Random"]) == ""


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (-1, 1, math.nan, True, "0.5")),
        ("(0, 1]", (0.5, 1), (0, 1.5)),
        ("(0, inf)", (1e-9, 1e9), (0, math.inf)),
        ("[0, inf)", (0, 3), (-1e-9, math.inf)),
    ],
)
def test_intervals(interval: str, inside: tuple[object, ...], outside: tuple[object, ...]) -> None:
    for value in inside:
        v.check_number("lr", value, interval)
    for value in outside:
        with pytest.raises(ConfigError, match="lr must be"):
            v.check_number("lr", value, interval)


def test_what_intervals_are_called() -> None:
    assert v.describe_interval("[0, 1)") == "a number in [0, 1)"
    assert v.describe_interval("(0, inf)") == "a finite number above 0"
    assert v.describe_interval("[0, inf)") == "a finite number of at least 0"
    with pytest.raises(ConfigError, match="lr must be positive, got -1"):
        v.check_number("lr", -1, "(0, inf)")
