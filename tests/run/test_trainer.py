import json

import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.cli import main
from gblr_plugin.run.trainer import accumulated, device_of, trainer_options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_epochs": 3}, "leave max_epochs out: the length of a training stands in dense"),
        ({"callbacks": []}, "leave callbacks out: a run sets it"),
        ({"val_check_interval": 5}, "leave val_check_interval out: a run evaluates by itself, see evaluate_on"),
        ({"precison": "bf16-mixed"}, "Lightning's Trainer has no 'precison'; did you mean 'precision'"),
        ({"devices": 2}, "devices must be 1, or a list with the number of one device, got 2"),
        ({"strategy": "ddp"}, "strategy must be auto, got 'ddp'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be a whole number of at least 1"),
        ({"precision": "half"}, "Lightning refuses it: "),
    ],
)
def test_what_is_not_for_a_run_is_refused_with_a_reason(given, message):
    with pytest.raises(ConfigError, match=f"trainer: {message}"):
        device_of(given)


def test_options_and_device():
    assert trainer_options({"precision": "bf16-mixed"}) == {
        "accelerator": "auto",
        "devices": 1,
        "log_every_n_steps": 10,
        "precision": "bf16-mixed",
    }
    assert device_of({"accelerator": "cpu"}) == torch.device("cpu")
    assert (accumulated({}), accumulated({"accumulate_grad_batches": 4})) == (1, 4)


def test_a_run_with_mixed_precision_accumulation_and_clipping_ends_within_its_budget(project):
    trainer = "trainer={accelerator: cpu, precision: bf16-mixed, accumulate_grad_batches: 4, gradient_clip_val: 1.0}"
    more = ["--set", "finetune.epochs=8", "--set", "dense.epochs=4", "--set", "evaluate_on=100"]
    assert main(["run", "config.yaml", "--output", "out", "--set", trainer, *more]) == 0
    report = json.loads((project / "out/report.json").read_text())
    figures = report["methods"][1]["seeds"][0]
    assert 0.45 < figures["relative_flops"] <= 0.5
    assert report["settings"]["trainer"]["precision"] == "bf16-mixed"
    assert (figures["accuracy"] * 100) % 1 == pytest.approx(0, abs=1e-6)  # of 100 examples


def test_a_refused_key_is_said_before_anything_is_written(project, capfd):
    assert main(["run", "config.yaml", "--output", "out", "--set", "trainer={max_epochs: 3}"]) == 2
    assert capfd.readouterr().err.startswith("gblr: trainer: leave max_epochs out: ")
    assert not (project / "out").exists()
