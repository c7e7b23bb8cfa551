"""What each private name of Lightning stands for, seen through what Lightning does in public."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from gblr_plugin.lightning import _compat


class At(Callback):
    """Calls a function when training has begun, and notes the batches that follow."""

    def __init__(self, call=lambda trainer: None):
        self.call, self.batches = call, []

    def on_train_start(self, trainer, pl_module):
        self.call(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())


def trained(make_module, make_trainer, call, **options):
    callback = At(call)
    module = make_module(**options)
    trainer = make_trainer([callback], max_steps=-1, max_epochs=1)
    trainer.fit(module)
    return trainer, module, callback.batches


def test_the_loaders_are_those_that_give_the_batches(make_module, make_trainer):
    found = []
    _, _, batches = trained(make_module, make_trainer, lambda trainer: found.extend(_compat.loaders_of(trainer)))
    (loader,) = found
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert len(loader) == len(batches)


def test_dropped_batches_are_not_trained_on(make_module, make_trainer):
    _, _, batches = trained(make_module, make_trainer, lambda trainer: None)

    def drop(trainer):
        _compat.start_loaders(trainer)
        _compat.drop_batches(trainer, 2)

    _, _, left = trained(make_module, make_trainer, drop)
    assert all(torch.equal(a, b) for a, b in zip(left, batches[2:], strict=False))
    _, _, again = trained(make_module, make_trainer, lambda trainer: _compat.drop_batches(trainer, 1000))
    assert all(torch.equal(a, b) for a, b in zip(again, batches, strict=True))  # fewer batches: from the beginning


class TwoSchedules(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.schedulers = [
            torch.optim.lr_scheduler.ConstantLR(optimizer),
            torch.optim.lr_scheduler.StepLR(optimizer, 2),
        ]
        chain = torch.optim.lr_scheduler.SequentialLR(optimizer, self.schedulers, [1])
        return {"optimizer": optimizer, "lr_scheduler": chain}


def test_schedulers_include_those_inside_others(make_trainer):
    found, module = [], TwoSchedules()
    trainer = make_trainer([At(lambda trainer: found.extend(_compat.schedulers_of(trainer)))], max_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4, 2)))
    assert [type(scheduler).__name__ for scheduler in found] == ["SequentialLR", "ConstantLR", "StepLR"]
    assert found[1:] == module.schedulers


def test_callbacks_that_put_averages_in_place_of_weights():
    class Mine(StochasticWeightAveraging):
        pass

    assert _compat.averages_weights(StochasticWeightAveraging(0.1)) == "StochasticWeightAveraging"
    assert _compat.averages_weights(Mine(0.1)) == "Mine"
    assert _compat.averages_weights(ModelCheckpoint()) is None


def test_no_strategy_of_one_process_shards(make_trainer):
    assert _compat.shards_parameters(make_trainer([])) is None


@pytest.mark.parametrize("about", [{"layers": ["a"]}, {"layers": None, "exclude": ("b",)}])
def test_a_state_key_is_that_under_which_a_checkpoint_keeps_the_state(about, make_module, make_trainer, tmp_path):
    class Kept(Callback):
        @property
        def state_key(self):
            return _compat.state_key(self, **about)

        def state_dict(self):
            return {"kept": 1}

    trainer = make_trainer([Kept()], max_steps=1)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    states = torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"]
    (key,) = [key for key, state in states.items() if state == {"kept": 1}]
    assert key == _compat.state_key(Kept(), **about)
    assert all(str(value) in key for value in about.values())


def test_a_loaded_checkpoint_is_there_while_weights_are_loaded(make_module, make_trainer, tmp_path):
    trainer = make_trainer([], max_steps=1)
    module = make_module()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, seen = make_trainer([], max_steps=2), []
    module.register_load_state_dict_pre_hook(lambda *_: seen.append(_compat.loaded_checkpoint(again)["global_step"]))
    assert not _compat.loaded_checkpoint(again)
    again.fit(module, ckpt_path=tmp_path / "end.ckpt")
    assert seen == [1]
    assert not _compat.loaded_checkpoint(again)


def test_how_loggers_take_pictures(tmp_path):
    class Images(CSVLogger):
        def log_image(self, key, images, step=None):
            pass

    assert _compat.takes_pictures(Images(tmp_path)) == "log_image"
    assert _compat.takes_pictures(TensorBoardLogger(tmp_path)) == "add_image"
    assert _compat.takes_pictures(CSVLogger(tmp_path)) is None


def test_a_layer_that_nni_has_wrapped_is_seen():
    pytest.importorskip("nni")
    from nni.compression.pruning import LevelPruner

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert not _compat.is_driven_by_nni(model[0])
    pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert _compat.is_driven_by_nni(model[0])
    pruner.unwrap_model()
    assert not _compat.is_driven_by_nni(model[0])
