"""Calibration and allocation as keys of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gblr_plugin.cli import main

SMALL = ["--set", "finetune.epochs=1", "--set", "finetune.lr=1e-9", "--set", "finetune.warmup_fraction=0"]


def run(project: Path, name: str, *settings: str) -> dict[str, Any]:
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["run", "config.yaml", "--output", name, *SMALL, *sets]) == 0
    found = json.loads((project / name / "report.json").read_text())
    return {method["name"]: method for method in found["methods"]}


def test_calibrated_starts_and_shared_budgets(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    methods = "methods=[{name: gblr_fixed, options: {method: trapezoid}}, {name: low_rank}]"
    dense = ["budget=0.4", "dense.epochs=15", "dense.lr=5e-3", "dense.batch_size=64", methods]
    plain = run(project, "plain", *dense)
    fitted = run(project, "fitted", *dense, "calibration={batches: 4, damping: 1e-2}", "allocation=sensitivity")
    for name in ("gblr_fixed", "low_rank"):
        before, after = plain[name]["seeds"][0], fitted[name]["seeds"][0]
        assert after["loss"] < before["loss"]  # nothing was learned: both are one-shot
        assert after["relative_flops"] <= 0.4
    settings = json.loads((project / "fitted/report.json").read_text())["settings"]
    assert settings["calibration"] == {"batches": 4, "damping": 0.01, "sequential": True, "loss": True}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibration={batches: 0}", "calibration: batches must be a whole number of at least 1, got 0"),
        ("calibration={damping: 2.0}", "calibration: damping must be a number in (0, 1], got 2.0"),
        ("calibration={batch: 8}", "unknown key; did you mean 'batches'?"),
        ("allocation=fair", "allocation: must be one of uniform, weight, output, sensitivity, alds, got 'fair'"),
        ("allocation=output", "allocation: rule 'output' needs calibration batches"),
    ],
)
def test_mistakes_are_one_line(project: Path, capfd: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    assert main(["run", "config.yaml", "--output", "out", "--set", setting]) != 0
    shown = capfd.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (project / "out").exists()
