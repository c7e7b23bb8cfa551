"""The choice among several starts by a trial of each."""

import copy
import math
import re
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from gblr_plugin import GBLRTensor
from gblr_plugin.cli import main
from gblr_plugin.errors import ConfigError
from gblr_plugin.run import compression, starting
from gblr_plugin.run.context import RunContext
from gblr_plugin.run.data import data_of
from gblr_plugin.run.pipeline import prepare_run
from gblr_plugin.run.settings import Method, RunSettings, Training
from gblr_plugin.utils.console import Console

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


@pytest.mark.parametrize("trial", [0.5, 1.0])
def test_the_start_that_fits_best_after_a_trial_is_trained(project, capfd, trial, monkeypatch):
    chosen = []
    make_compressor = compression.make_compressor

    def watched(context, method, *args, **options):
        chosen.append((method.config_list[0]["gblr"]["initialiser"], method.training))
        return make_compressor(context, method, *args, **options)

    monkeypatch.setattr(compression, "make_compressor", watched)
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
    job = prepare_run(settings)
    assert not chosen
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
        method = starting.starting_from(job.context, settings.methods[0], best)
        alone = prepare_run(replace(settings, methods=[method]))
        alone.run(project / "alone", Console())
        for a, b in zip(*(run.records.networks["gblr"].parameters() for run in (job, alone)), strict=True):
            a, b = (part.to_dense() if isinstance(part, GBLRTensor) else part for part in (a, b))
            assert torch.equal(a, b)
        assert job.records.histories == alone.records.histories


def test_a_start_whose_trial_diverges_is_not_taken(monkeypatch, capfd):
    losses = iter([math.nan, 2.0, 1.0, math.nan])
    monkeypatch.setattr(starting, "compress_once", lambda context, method, network, seed, **options: (network, {}))
    monkeypatch.setattr(starting, "evaluate", lambda *args: {"loss": next(losses)})
    starts = ["gblr", "block_sparse", "random", "svd"]
    method = Method("gblr", starts=starts, trial=1.0)
    settings = RunSettings("digits_vit", budget=0.5, model={"dim": 16, "depth": 1, "heads": 2}, methods=[method])
    context = RunContext.of(settings)
    starting.compress(context, method, context.task.network(), 0)
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

    train_dense, compress_once = starting.train_dense, starting.compress_once

    def watched_dense(context, seed, *args):
        data = data_of(context.task, seed, settings.finetune)
        return seen(train_dense(context, seed, *args), data, "dense", None)

    def watched_compression(context, method, network, seed, **options):
        begun = network.home
        found = compress_once(context, method, network, seed, **options)
        data = data_of(context.task, seed, settings.finetune)
        seen(found[0], data, method.config_list[0]["gblr"]["initialiser"], method.training)
        found[0].begun = begun
        return found

    def seen(network, data, kind, training):
        indices = getattr(data.train_set, "indices", None)
        network.home = kind, None if indices is None else tuple(indices)
        trained.append((kind, network.home[1], training))
        return network

    def loss(network, loader, metric, device):
        kind, part = network.home
        examples = loader.dataset  # all of the part, in order
        unseen = tuple(examples.dataset.indices[place] for place in examples.indices)
        judged.append((kind, part, network.begun, unseen))
        return {"loss": {"gblr": 1.0, "block_sparse": 2.0}[kind], metric: {"gblr": 50.0, "block_sparse": 60.0}[kind]}

    context = replace(prepare_run(settings).context, events=tmp_path)
    begun = context.task.network()
    begun.home = "dense", None
    with monkeypatch.context() as patch:
        patch.setattr(starting, "evaluate", loss)
        patch.setattr(starting, "train_dense", watched_dense)
        patch.setattr(starting, "compress_once", watched_compression)
        pl.seed_everything(1000)
        found, _ = starting.compress(context, method, copy.deepcopy(begun), 0)
    count = len(data_of(context.task, 0, settings.finetune).train_set)
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
    again, _ = starting.compress(context, starting.starting_from(context, method, "block_sparse"), begun, 0)
    for a, b in zip(found.parameters(), again.parameters(), strict=True):
        a, b = (part.to_dense() if isinstance(part, GBLRTensor) else part for part in (a, b))
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be 0 or at least 2, got 1"),
        ({"folds": -2}, "folds must be a whole number of at least 0, got -2"),
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
