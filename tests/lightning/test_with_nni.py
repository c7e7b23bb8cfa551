"""The callback beside the NNI pruner, which drives the structure itself."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

pytest.importorskip("nni")

import nni

from gblr_plugin.errors import ConfigError
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.lightning import GBLRCallback
from gblr_plugin.nni import GBLRPruner, LightningEvaluator

CONFIG = [{"op_names": ["net.0", "net.2"], "sparse_ratio": 0.6, "gblr_initialiser": "svd"}]


def compress(make_module, tmp_path, callbacks, watch=None):
    class Traced(make_module):
        def configure_optimizers(self):
            return nni.trace(torch.optim.AdamW)(self.parameters(), lr=0.01)

    trainer = nni.trace(pl.Trainer)(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        log_every_n_steps=5,
    )
    module = Traced()
    data = nni.trace(pl.LightningDataModule.from_datasets)(
        train_dataset=module.train_dataloader().dataset, batch_size=8
    )
    pruner = GBLRPruner(module, CONFIG, LightningEvaluator(trainer, data), warmup_step=3, cooldown_begin_step=14)
    if watch is not None:
        watch.watch(pruner.learner)
    pruner.compress(max_steps=None, max_epochs=4)
    return pruner, module


def test_the_callback_watches_what_the_pruner_drives(make_module, tmp_path, monkeypatch):
    taken = []
    original = StructureLearner.after_step
    monkeypatch.setattr(StructureLearner, "after_step", lambda self, opt: (taken.append(1), original(self, opt))[1])
    callback = GBLRCallback(picture_every_n_epochs=0)
    pruner, _ = compress(make_module, tmp_path, [callback], callback)
    assert pruner.learner.frozen
    assert len(taken) == 24  # 4 epochs of 6 steps: once each
    curve = dict(callback.history["relative_flops"])
    assert curve[24] == pytest.approx(pruner.learner.relative_flops)
    assert 0.39 < curve[24] <= 0.4 < curve[5]
    assert dict(callback.history["lambda"])[10] > 0
    assert [value for _, value in callback.history["frozen"]][-1] == 1.0


def test_the_callback_does_not_drive_beside_the_pruner(make_module, tmp_path):
    with pytest.raises(ConfigError, match="NNI pruner drives it already"):
        compress(make_module, tmp_path, [GBLRCallback(0.4, warmup=3, cooldown=14, picture_every_n_epochs=0)])
