"""The whole run, small; its bad inputs are in tests/test_cli.py."""

import copy
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from gblr_plugin import GBLRTensor, load, report
from gblr_plugin.cli import main
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRLayer
from gblr_plugin.run import pipeline, starting
from gblr_plugin.run.console import Console
from gblr_plugin.run.measure import evaluate
from gblr_plugin.run.pipeline import Job
from gblr_plugin.run.settings import Method, RunSettings, Training
from gblr_plugin.run.summary import RunReport
from gblr_plugin.surgery.reorder import reorder
from gblr_plugin.tasks import get_task
from gblr_plugin.tasks.base import ClassifierModule

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
    assert 0.49 < learned["relative_flops"] <= 0.5
    assert dense["relative_flops"] == 1.0
    assert learned["parameters"] < dense["parameters"]
    for figures in (dense, learned):
        assert figures["reloaded_accuracy"] == figures["accuracy"]

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


def test_compact_drops_dead_components_at_the_freeze(project, capfd, monkeypatch):
    compacted = []
    compact = GBLRLayer.compact

    def counted(layer, optimizers):
        compacted.append((layer.matrix_shape, layer.structure_frozen))
        return compact(layer, optimizers)

    monkeypatch.setattr(GBLRLayer, "compact", counted)
    assert main(["run", "config.yaml", *OWN]) == 0
    assert not compacted
    assert main(["run", "config.yaml", *OWN, "--set", "methods.0.compact=true"]) == 0
    assert compacted == [((32, 8), True), ((2, 32), True)]  # each layer once, when its structure is fixed


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
    assert re.search(r"^  \S+% 4: it is too small to gain from structure$", shown, re.MULTILINE)


def test_a_family_that_keeps_modules_of_its_own_comes_back_from_its_file(project):
    options = ["--set", "methods=[{name: block_sparse}]", "--set", "dense.epochs=1", "--set", "finetune.epochs=1"]
    assert main(["run", "config.yaml", *OWN, *options, "--set", "budget=0.9", "--output", "out"]) == 0
    figures = json.loads((project / "out/report.json").read_text())["methods"][1]["seeds"][0]
    assert figures["relative_flops"] <= 0.9
    assert figures["reloaded_accuracy"] == figures["accuracy"]


@pytest.mark.parametrize("trial", [0.5, 1.0])
def test_the_start_that_fits_best_after_a_trial_is_trained(project, capfd, trial):
    chosen = []

    class Watched(Job):
        def _compressor(self, method, *args):
            chosen.append((method.config_list[0]["gblr"]["initialiser"], method.training))
            return super()._compressor(method, *args)

    starts = ["gblr", "block_sparse", "random"]
    settings = RunSettings(
        "digits_vit",
        budget=0.5,
        model={"dim": 16, "depth": 1, "heads": 2, "held_out": 0.5},
        seeds=[0],
        dense=Training(epochs=1, batch_size=128),
        finetune=Training(epochs=2, batch_size=128),
        methods=[Method("gblr", starts=starts, trial=trial)],
        latency_batch=[1],
    )
    job = Watched(settings)
    job.check()
    chosen.clear()
    job.run(project, Console())
    lines = capfd.readouterr().out.splitlines()
    line = next(line for line in lines if "starts from" in line)
    found = line.split("trial: ")[1].split(", ")
    losses = {name: float(loss) for name, loss in (entry.split() for entry in found)}
    assert list(losses) == starts
    best = min(losses, key=losses.get)
    assert f"starts from {best!r}" in line
    tried = [(name, settings.finetune.shortened(trial)) for name in starts]
    assert chosen == (tried if trial == 1 else [*tried, (best, None)])
    assert best != "random"
    events = {folder.name for folder in project.glob("tensorboard/*/*")}
    assert events >= {f"seed0-gblr-from-{name}" for name in starts}
    assert ("seed0-gblr" in events) == (trial < 1)
    if trial == 1:  # the network is the one that was trained from that start alone
        chosen.clear()
        alone = Watched(replace(settings, methods=[job.starting(settings.methods[0], best)]))
        alone.check()
        alone.run(project / "alone", Console())
        for a, b in zip(*(run.networks["gblr"].parameters() for run in (job, alone)), strict=True):
            a, b = (part.to_dense() if isinstance(part, GBLRTensor) else part for part in (a, b))
            assert torch.equal(a, b)
        assert job.histories == alone.histories


def test_a_start_whose_trial_diverges_is_not_taken(monkeypatch, capfd):
    class Tried(Job):
        def compress_once(self, method, network, seed, **options):
            return network, {}

    losses = iter([math.nan, 2.0, 1.0, math.nan])
    monkeypatch.setattr(starting, "evaluate", lambda *args: {"loss": next(losses)})
    starts = ["gblr", "block_sparse", "random", "svd"]
    method = Method("gblr", starts=starts, trial=1.0)
    job = Tried(RunSettings("digits_vit", budget=0.5, model={"dim": 16, "depth": 1, "heads": 2}, methods=[method]))
    job.compress(method, job.task.network(), 0)
    assert "starts from 'random'" in capfd.readouterr().out


@pytest.mark.parametrize("trial", [0.5, 1.0])
def test_folds_judge_starts_on_data_that_neither_network_has_seen(monkeypatch, capfd, tmp_path, trial):
    digits = {"dim": 16, "depth": 1, "heads": 2, "held_out": 0.5}
    starts = ["gblr", "block_sparse"]
    method = Method("gblr", starts=starts, trial=trial, folds=2)
    settings = RunSettings(
        "digits_vit",
        budget=0.5,
        model=digits,
        dense=Training(epochs=1, batch_size=128),
        finetune=Training(epochs=2, batch_size=128),
        methods=[method],
    )
    trained, judged = [], []

    class Watched(Job):
        def train_dense(self, seed, *args):
            return seen(super().train_dense(seed, *args), self.data(seed), "dense", None)

        def compress_once(self, method, network, seed, **options):
            begun = network.home
            found = super().compress_once(method, network, seed, **options)
            seen(found[0], self.data(seed), method.config_list[0]["gblr"]["initialiser"], method.training)
            found[0].begun = begun
            return found

    def seen(network, data, kind, training):
        indices = getattr(data.train_set, "indices", None)
        network.home = kind, None if indices is None else tuple(indices)
        trained.append((kind, network.home[1], training))
        return network

    def loss(network, loader, metric):
        kind, part = network.home
        judged.append((kind, part, network.begun, tuple(loader.dataset.indices)))
        return {"loss": {"gblr": 1.0, "block_sparse": 2.0}[kind], metric: {"gblr": 50.0, "block_sparse": 60.0}[kind]}

    monkeypatch.setattr(starting, "evaluate", loss)
    job = Watched(settings)
    job.check()
    job.show_on(Console(), tmp_path)
    begun = job.task.network()
    begun.home = "dense", None
    pl.seed_everything(1000)
    found = job.compress(method, copy.deepcopy(begun), 0)
    count = len(job.data(0).train_set)
    assert sorted(index for _, _, _, part in judged[:: len(starts)] for index in part) == list(range(count))
    for _, part, (_, dense_part), unseen in judged:
        assert part == dense_part
        assert set(part) | set(unseen) == set(range(count))
        assert not set(part) & set(unseen)
    assert [kind for kind, *_ in judged] == starts * 2
    assert [kind for kind, *_ in trained] == ["dense", *starts, "dense", *starts, "block_sparse"]
    assert [training for *_, training in trained[1:3]] == [settings.finetune.shortened(trial)] * 2
    assert found.home == ("block_sparse", None)
    assert found.begun == ("dense", None)
    assert "starts from 'block_sparse'; accuracy on 2 unseen parts after a trial: gblr 50" in capfd.readouterr().out
    pl.seed_everything(1000)
    alone = Job(replace(settings, methods=[job.starting(method, "block_sparse")]))
    alone.show_on(Console(), tmp_path)
    again = alone.compress(alone.settings.methods[0], begun, 0)
    for a, b in zip(found.parameters(), again.parameters(), strict=True):
        a, b = (part.to_dense() if isinstance(part, GBLRTensor) else part for part in (a, b))
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be 0 or at least 2, got 1"),
        ({"folds": -2}, "folds must be 0 or at least 2, got -2"),
        ({"folds": 2, "starts": []}, "folds judge starts: give the starts to choose from"),
    ],
)
def test_folds_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Method("gblr", **{"starts": ["gblr", "svd"], **options})


def test_folds_need_data_that_is_left(project, capfd):
    methods = "methods=[{name: gblr, starts: [gblr, svd], folds: 2}]"
    assert main(["run", "config.yaml", *OWN, "--set", methods, "--set", "finetune.batch_size=64"]) == 2
    assert "data: 32 training examples are less than one batch of 64" in capfd.readouterr().err
    assert main(["run", "config.yaml", *OWN, "--set", methods, "--set", "weights=dense.pt"]) == 2
    assert "folds need training data that the dense network has not seen" in capfd.readouterr().err


def test_a_start_that_cannot_work_is_refused_before_training(project, capfd):
    settings = "config_list=[{op_names: [network.0], sparse_ratio: 0.5, granularity: [4, 4]}]"
    starts = "methods=[{name: gblr, starts: [gblr, block_sparse]}]"
    assert main(["run", "config.yaml", *OWN, "--set", "budget=null", "--set", settings, "--set", starts]) == 2
    assert "layer 'network.0': initialise: 'block_sparse' has no aligned form" in capfd.readouterr().err


def test_distillation_learns_from_the_dense_network(project, monkeypatch):
    taught = []
    monkeypatch.setattr(ClassifierModule, "learn_from", lambda module, teacher: taught.append((module, teacher)))
    options = ["--set", "finetune.distillation=0.5", "--set", "methods=[{name: block_sparse}]"]
    options += ["--set", "budget=0.9"]
    assert main(["run", "config.yaml", *OWN, *options, "--output", "out"]) == 0
    for module, teacher in taught:
        assert type(teacher[0]) is torch.nn.Linear
        assert teacher is not module.network
    saved = load(project / "out/dense.safetensors", lambda: copy.deepcopy(taught[-1][1]))
    for trained, parameter in zip(saved.parameters(), taught[-1][1].parameters(), strict=True):
        assert torch.equal(trained, parameter)


def test_hidden_units_are_reordered_before_compression(project, capfd, monkeypatch):
    orders = []
    monkeypatch.setattr(pipeline, "reorder", lambda *args, **options: orders.append(reorder(*args, **options)))
    once = ["--set", "dense.epochs=1", "--set", "methods=[{name: gblr_fixed}]", "--set", "finetune.epochs=1"]
    pairs = ["--set", "reorder=[[network.0, network.3]]"]
    assert main(["run", "config.yaml", *OWN, *once, *pairs, "--set", "budget=0.5", "--output", "out"]) == 0
    assert sorted(orders[-1]["network.3"].tolist()) == list(range(32))
    bad = ["--set", "reorder=[[network.3, network.0]]"]
    assert main(["run", "config.yaml", *OWN, *once, *bad, "--set", "budget=0.5", "--output", "none"]) == 2
    assert "reorder: 'network.3' makes 2 units and 'network.0' takes 8; need as many" in capfd.readouterr().err
    assert not (project / "none").exists()
