"""NNI's own pruners in a run: fine-tuned like the others, and reported for what they are."""

import json
import re

import pytest
from safetensors.torch import load_file

from gblr_plugin.cli import main
from gblr_plugin.run.summary import RunReport

OWN = ["task=own_task:Task", "model={}", "dense.batch_size=16", "finetune.batch_size=16", "budget=null"]
METHODS = """[
  {name: l1},
  {name: taylor, options: {training_steps: 2}},
  {name: movement, options: {warmup_step: 1, cooldown_begin_step: 6}},
  {name: agp, options: {pruner: level, interval_steps: 2, total_times: 2}},
]"""


def run(*overrides):
    return main(["run", "config.yaml", "--output", "out", *(f"--set={one}" for one in (*OWN, *overrides))])


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
