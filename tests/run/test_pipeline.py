"""The whole run, small; its bad inputs are in tests/test_cli.py."""

import json
import math
import re
import sys

import pytest

from gblr_plugin import GBLRTensor, load, report
from gblr_plugin.cli import main
from gblr_plugin.run.measure import evaluate
from gblr_plugin.run.summary import RunReport
from gblr_plugin.tasks import get_task

OWN = [
    "--set",
    "task=own_task:Task",
    "--set",
    "model={}",
    "--set",
    "dense.batch_size=16",
    "--set",
    "finetune.batch_size=16",
]


def test_a_run_leaves_everything_and_can_be_repeated_from_its_dense_network(project, capfd):
    assert main(["run", "config.yaml", "--output", "out"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80 or "tensorboard --logdir" in max(lines, key=len)
    assert lines[0].startswith("seed 0  dense")
    for noise in ("GPU available", "litlogger", "Failed to load", "Seed set", "warning"):
        assert noise not in shown.out

    found = {path.name for path in (project / "out").iterdir()}
    files = {"report.json", "report.txt", "model.safetensors", "dense.safetensors", "run.log"}
    assert found == files | {"tensorboard", "figures"}
    assert {path.name for path in (project / "out/figures").iterdir()} >= {"pareto.png", "structure.png"}
    assert len(list((project / "out/tensorboard").rglob("events.out.tfevents.*"))) == 2

    values = json.loads((project / "out/report.json").read_text())
    summary = RunReport.from_dict(values)
    assert str(summary) == (project / "out/report.txt").read_text().rstrip("\n")
    dense, learned = summary["dense"].seeds[0], summary["gblr"].seeds[0]
    assert 0.47 < learned["relative_flops"] <= 0.5  # of 16 channels a component costs some hundredths
    assert dense["relative_flops"] == 1.0
    assert learned["parameters"] < dense["parameters"]

    # The saved file is the network that was reported.
    task = get_task("digits_vit")(dim=16, depth=1, heads=2, held_out=0.5)
    network = load(project / "out/model.safetensors", task.network)
    assert isinstance(network.blocks[0].fc1.weight, GBLRTensor)
    assert evaluate(network, task.data(0, 128).test_dataloader(), "accuracy")["accuracy"] == learned["accuracy"]
    assert report(network, task.example_input()).relative_flops == learned["relative_flops"]

    # Again, over the same folder, from the dense network that was saved.
    assert main(["run", "config.yaml", "--output", "out", "--set", "weights=out/dense.safetensors"]) == 0
    capfd.readouterr()
    again = RunReport.from_dict(json.loads((project / "out/report.json").read_text()))
    assert again["dense"].seeds[0]["accuracy"] == dense["accuracy"]
    assert again["gblr"].seeds[0]["accuracy"] == pytest.approx(learned["accuracy"], abs=10)

    assert main(["report", "out"]) == 0
    assert capfd.readouterr().out.rstrip("\n") == str(again)
    assert main(["report", "out/report.json", "--json"]) == 0
    assert RunReport.from_dict(json.loads(capfd.readouterr().out)) == again


def test_a_users_own_task_from_the_working_directory(project, capfd):
    assert main(["run", "config.yaml", *OWN]) == 0
    shown = capfd.readouterr()
    assert "too small to gain" not in shown.out
    assert "everything is in outputs/config" in shown.out
    summary = RunReport.from_dict(json.loads((project / "outputs/config/report.json").read_text()))
    assert [method.name for method in summary.methods] == ["dense", "gblr"]
    assert math.isfinite(summary["gblr"].seeds[0]["loss"])


@pytest.mark.parametrize("stop_at", ["1", "6"])
def test_a_failing_run_exits_with_1_and_keeps_the_earlier_report(project, capfd, monkeypatch, stop_at):
    out = project / "out"
    out.mkdir()
    (out / "report.json").write_text("earlier")
    monkeypatch.setenv("STOP_AT", stop_at)
    assert main(["run", "config.yaml", "--output", "out", *OWN]) == 1
    shown = capfd.readouterr()
    assert shown.err == "gblr: the run failed: RuntimeError: the disk (details in out/run.log)\n"
    assert "is on fire" in (out / "run.log").read_text()
    assert (out / "report.json").read_text() == "earlier"
    kept = {".unfinished"} if stop_at == "6" else set()  # the dense network was trained by then
    assert {path.name for path in out.iterdir()} == {"report.json", "run.log", "tensorboard"} | kept


def test_a_small_layer_stays_dense_and_the_report_says_so(project, capfd):
    assert main(["run", "config.yaml", *OWN, "--set", "model.width=1", "--output", "out"]) == 2
    message = capfd.readouterr().err
    assert "too small" in message
    config = "[{op_types: [Linear], sparse_ratio: 0.5}]"
    arguments = [*OWN, "--set", "budget=null", "--set", f"config_list={config}", "--output", "out"]
    (project / "own_task.py").write_text(
        (project / "own_task.py")
        .read_text()
        .replace("nn.Linear(self.width, 2)", "nn.Linear(self.width, 8), nn.Linear(8, 1), nn.Linear(1, 2)")
    )
    sys.modules.pop("own_task")
    assert main(["run", "config.yaml", *arguments]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"^  \S+% 2 layers, 4 to 5: it is too small to gain from structure$", shown, re.MULTILINE)


def test_a_family_that_keeps_modules_of_its_own_comes_back_from_its_file(project):
    options = ["--set", "methods=[{name: block_sparse}]", "--set", "dense.epochs=1", "--set", "finetune.epochs=1"]
    assert main(["run", "config.yaml", *OWN, *options, "--set", "budget=0.9", "--output", "out"]) == 0
    figures = json.loads((project / "out/report.json").read_text())["methods"][1]["seeds"][0]
    assert figures["relative_flops"] <= 0.9
