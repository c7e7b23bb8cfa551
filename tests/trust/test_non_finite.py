"""NaN and infinity stop training with the layer's name, before they spread, or cost one step where that was chosen."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from gblr_plugin import ConfigError, GBLRError
from gblr_plugin.learning.non_finite import save_diagnostic
from gblr_plugin.lightning import GBLRCallback


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("at", [0, 5, 13], ids=["first step", "while shrinking", "cool-down"])
def test_a_loss_of_nan_stops_and_spoils_nothing(make_run, state_of, tmp_path, at, closure):
    run = make_run(diagnostics=tmp_path)
    run.train(at, closure=closure)
    before = state_of(run.model)
    with pytest.raises(GBLRError, match=rf"layer '0': the gradient of .* at step {at}; .*\(details in .*\)") as caught:
        run.train(1, poisoned=(at,), closure=closure)
    same(state_of(run.model), before)
    (file,) = tmp_path.iterdir()
    assert str(file) in str(caught.value)
    report = json.loads(file.read_text())
    assert (report["step"], report["layer"], report["loss"]) == (at, "0", "nan")
    assert report["layers"]["2"]["U"]["gradient"]["not_finite"] == report["layers"]["2"]["U"]["values"]["entries"]
    assert report["layers"]["2"]["U"]["values"]["not_finite"] == 0


@pytest.mark.parametrize("part", ["U", "V", "widths", "locations"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_not_finite_are_named_first(make_run, tmp_path, part, value):
    run = make_run(diagnostics=tmp_path, non_finite="skip")  # which skips gradients alone
    run.train(3)
    with torch.no_grad():
        getattr(run.layers["2"], part).view(-1)[1] = value
    with pytest.raises(GBLRError, match=f"layer '2': {part} became NaN or infinite"):
        run.train(1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("closure", [False, True])
def test_skipped_steps_leave_everything_as_it_was(make_run, state_of, caplog, closure):
    run = make_run(non_finite="skip")
    run.train(4, closure=closure)
    before, moments = state_of(run.model), copy.deepcopy(run.optimizer.state_dict())
    run.train(3, poisoned=(4, 5, 6), closure=closure)
    same(state_of(run.model), before)
    for index, state in moments["state"].items():
        same(state, run.optimizer.state_dict()["state"][index])
    assert (run.learner.skipped_steps, run.learner.step_count) == (3, 4)
    assert sum("the step is skipped" in message for message in caplog.messages) == 1
    run.train(10, closure=closure)
    assert run.learner.frozen
    assert run.learner.relative_flops <= 0.4


def test_skipping_without_end_is_an_error(make_run, tmp_path):
    run = make_run(non_finite="skip", diagnostics=tmp_path)
    with pytest.raises(GBLRError, match="layer '0': the gradient of"):
        run.train(102, poisoned=tuple(range(102)))
    assert run.learner.skipped_steps == 100


def test_a_gradient_outside_the_structured_layers_counts_too(make_run, tmp_path):
    run = make_run(diagnostics=tmp_path)
    run.loss().backward()
    run.optimizer.param_groups[0]["params"][-1].grad[0] = float("inf")  # the bias of the last layer, structured or not
    with pytest.raises(GBLRError, match="became NaN or infinite at step 0"):
        run.optimizer.step()


def test_large_finite_gradients_are_no_matter(make_run):
    run = make_run()
    run.loss().backward()
    for parameter in run.model.parameters():
        parameter.grad.fill_(3e38)  # their sum overflows
    run.optimizer.step()
    assert run.learner.step_count == 1


def test_a_folder_that_cannot_be_written_to_does_not_hide_the_error(make_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = make_run(diagnostics=tmp_path / "file" / "inner")
    with pytest.raises(GBLRError, match="details in") as caught:
        run.train(1, poisoned=(0,))
    saved = Path(re.search(r"details in (.*)\)", str(caught.value))[1])
    assert saved.exists()
    saved.unlink()


def test_no_place_at_all(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file" / "inner"))
    (tmp_path / "file").write_text("in the way")
    assert save_diagnostic(make_run().layers, {}, None) is None


def test_unknown_choice(make_run):
    with pytest.raises(ConfigError, match="non_finite must be one of stop, skip, got 'ignore'"):
        make_run(non_finite="ignore")
    with pytest.raises(ConfigError, match="callback: non_finite must be one of stop, skip, got 'ignore'"):
        GBLRCallback(0.5, non_finite="ignore")


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_under_lightning(tmp_path, choice):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean() * (float("nan") if index == 3 else 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module, callback = Module(), GBLRCallback(0.5, warmup=1, cooldown=6, non_finite=choice)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.randn(40, 16)), batch_size=4)
    if choice == "stop":
        with pytest.raises(GBLRError, match=r"layer 'net\.0': the gradient of"):
            trainer.fit(module, data)
        (file,) = tmp_path.glob("gblr-step3-*.json")
        assert json.loads(file.read_text())["loss"] == "nan"
    else:
        trainer.fit(module, data)
        assert (callback.learner.skipped_steps, callback.learner.step_count) == (1, 9)
        assert callback.learner.frozen
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
