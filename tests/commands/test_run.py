"""``gblr run`` and what other commands do with its output; the run itself is in tests/run/test_pipeline.py."""

import json

import pytest
import torch


def test_a_run_its_report_its_file_and_an_export(call, config, tmp_path):
    code, out, err = call("run", config, "--output", "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "gblr-run-report"
    assert "seed 0  gblr" in err
    assert json.loads(call("report", "out", "--json")[1]) == report

    contents = json.loads(call("inspect", "out", "--json")[1])
    layers = {layer["name"]: layer for layer in report["methods"][1]["layers"]["layers"]}
    for weight in contents["weights"]:
        assert weight["entries"] == layers[weight["name"]]["parameters"]

    code, out, err = call("export", "out", "--output", "model.pt2", "--batch", "3")
    assert (code, err) == (0, "")
    program = torch.export.load("model.pt2").module()
    assert program(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_a_dry_run_checks_all_and_says_what_would_be_trained(call, config, tmp_path):
    more = ["--set", "methods=[{name: gblr, start: initial}, {name: low_rank, training: {epochs: 3}}]"]
    code, out, err = call("run", config, "--dry-run", "--output", "out", *more)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "seeds 0; dense: trained, epochs 1",
        "gblr: from initial, epochs 1",
        "low_rank: from trained, epochs 3",
        "would write to out; nothing was written",
    ]
    assert not (tmp_path / "out").exists()
    assert call("run", config, "--dry-run", "--set", "methods.0.name=gbrl")[0] == 2


def test_what_goes_with_trials_alone(call, config):
    code, _, err = call("run", config, "--flops-price", "2")
    assert (code, err) == (2, "gblr: --flops-price goes with --trial\n")


@pytest.mark.parametrize("flag", ["--debug", "-v"])
def test_an_error_with_its_traceback(call, config, flag):
    code, _, err = call("run", config, "--set", "task=nothing", flag)
    assert code == 2
    assert ("Traceback" in err) == (flag == "--debug")
    assert err.splitlines()[-1].startswith("gblr: task: unknown task 'nothing'")
