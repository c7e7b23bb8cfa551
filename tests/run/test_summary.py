import json

import pytest
import torch
from torch import nn

from gblr_plugin import report
from gblr_plugin.run.summary import MethodResult, RunReport


def seed(number, accuracy, flops=0.25):
    return {
        "seed": number,
        "accuracy": accuracy,
        "relative_flops": flops,
        "parameters": 123456,
        "file_bytes": 2048 * number + 2048,
    }


@pytest.fixture
def summary():
    layers = report(nn.Sequential(nn.Linear(8, 4)), torch.ones(1, 8))
    latency = {"1": 0.1234, "64": 12.5}
    return RunReport(
        "digits_vit",
        "accuracy",
        True,
        [
            MethodResult("dense", [seed(0, 97.0, 1.0), seed(1, 98.0, 1.0)], latency, layers),
            MethodResult("gblr", [seed(0, 96.0), seed(1, 99.0)], latency, layers),
        ],
        {"torch": "2"},
        {"seeds": [0, 1]},
    )


def test_json_round_trip(summary):
    assert RunReport.from_dict(json.loads(summary.to_json())) == summary


def test_table(summary):
    lines = str(summary).splitlines()
    assert lines[0] == "digits_vit: accuracy on held-out data, mean ± half range over seeds 0, 1"
    assert lines[2].split() == [
        "method",
        "accuracy",
        "rel.",
        "FLOPs",
        "parameters",
        "file",
        "KB",
        "ms",
        "@",
        "1",
        "ms",
        "@",
        "64",
    ]
    assert lines[4].split() == ["dense", "97.50", "±0.50", "1.0000", "123,456", "3", "0.12", "12.50"]
    assert lines[5].split() == ["gblr", "97.50", "±1.50", "0.2500", "123,456", "3", "0.12", "12.50"]
    assert "layers of gblr, first seed" in lines
    assert max(map(len, lines)) <= 80


def test_one_seed_has_no_spread():
    one = RunReport("t", "accuracy", True, [MethodResult("dense", [seed(3, 50.0)])])
    assert str(one).splitlines()[0] == "t: accuracy on held-out data, seed 3"
    assert "±" not in str(one)


def test_means(summary):
    assert summary["gblr"].mean("file_bytes") == 3072


@pytest.mark.parametrize("values", [{}, {"format": "gblr-run-report", "version": 2}, {"format": "other", "version": 1}])
def test_other_json_is_refused(values):
    with pytest.raises(ValueError, match="not a gblr-run-report"):
        RunReport.from_dict(values)
