"""One compression in a run; NNI's own pruners are fine-tuned like the others, and reported for what they are."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from gblr_plugin import load
from gblr_plugin.cli import main
from gblr_plugin.layers import GBLRLayer
from gblr_plugin.run import compression
from gblr_plugin.run.summary import RunReport
from gblr_plugin.surgery.reorder import reorder
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
SHRINKING = [
    "--set",
    "budget=null",
    "--set",
    "config_list=[{op_names_re: ['network.*'], sparse_ratio: 0.5, global_group_id: all, gblr: {initialiser: svd}}]",
]


def test_compact_drops_dead_components_at_the_freeze(project, capfd, monkeypatch):
    compacted = []
    compact = GBLRLayer.compact

    def counted(layer, optimizers):
        compacted.append((layer.matrix_shape, layer.structure_frozen))
        return compact(layer, optimizers)

    monkeypatch.setattr(GBLRLayer, "compact", counted)
    assert main(["run", "config.yaml", *OWN, *SHRINKING]) == 0
    assert not compacted
    assert main(["run", "config.yaml", *OWN, *SHRINKING, "--set", "methods.0.compact=true"]) == 0
    assert compacted == [((32, 8), True), ((2, 32), True)]  # each layer once, when its structure is fixed


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
    monkeypatch.setattr(compression, "reorder", lambda *args, **options: orders.append(reorder(*args, **options)))
    once = ["--set", "dense.epochs=1", "--set", "methods=[{name: gblr_fixed}]", "--set", "finetune.epochs=1"]
    pairs = ["--set", "reorder=[[network.0, network.3]]"]
    assert main(["run", "config.yaml", *OWN, *once, *pairs, "--set", "budget=0.5", "--output", "out"]) == 0
    assert sorted(orders[-1]["network.3"].tolist()) == list(range(32))
    bad = ["--set", "reorder=[[network.3, network.0]]"]
    assert main(["run", "config.yaml", *OWN, *once, *bad, "--set", "budget=0.5", "--output", "none"]) == 2
    assert "reorder: 'network.3' makes 2 units and 'network.0' takes 8; need as many" in capfd.readouterr().err
    assert not (project / "none").exists()


SMALL = ["task=own_task:Task", "model={}", "dense.batch_size=16", "finetune.batch_size=16", "budget=null"]
METHODS = """[
  {name: l1},
  {name: taylor, options: {training_steps: 2}},
  {name: movement, options: {warmup_step: 1, cooldown_begin_step: 6}},
  {name: agp, options: {pruner: level, interval_steps: 2, total_times: 2}},
]"""


def run(*overrides):
    return main(["run", "config.yaml", "--output", "out", *(f"--set={override}" for override in (*SMALL, *overrides))])


def test_pruned_entries_are_zeros_that_still_count(project, capfd):
    config = "config_list=[{op_names: [network.0], sparse_ratio: 0.5}]"
    assert run(config, f"methods={METHODS}") == 0, capfd.readouterr().err
    summary = RunReport.from_dict(json.loads((project / "out/report.json").read_text()))
    assert [method.name for method in summary.methods] == ["dense", "l1", "taylor", "movement", "agp"]
    for method in summary.methods[1:]:
        assert method.seeds[0]["relative_flops"] == 1.0
        notes = {layer.name: layer.note for layer in method.layers.layers if layer.note}
        assert list(notes) == ["0"]
        assert re.fullmatch(r"(4[5-9]|5[0-5])% of its entries are zero, and multiplied", notes["0"])
    saved = load_file(project / "out/model.safetensors")
    assert float((saved["0.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert not (saved["3.weight"] == 0).any()


def test_a_quantizer_is_refused_before_anything_is_written(project, capfd):
    config = "config_list=[{op_names: [network.0], target_names: [weight], quant_dtype: int8}]"
    assert run(config, "methods=[{name: qat}]") == 2
    assert "methods: 'qat' is a quantizer" in capfd.readouterr().err
    assert not (project / "out").exists()
