from __future__ import annotations

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from gblr_plugin.lightning import GBLRCallback

EPOCHS, BATCHES = 2, 4


class Noisy(torch.utils.data.Dataset):
    """Examples with noise from all three libraries, as augmentations draw it."""

    def __len__(self):
        return 2 * BATCHES

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


class Endless(IterableDataset):
    """Of unknown length; Lightning fetches one batch ahead."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
        return (torch.rand(4, generator=generator) for _ in range(2 * BATCHES))


class Standing:
    """A loader that knows where it is."""

    def __init__(self):
        self.given = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for number in range(self.given % BATCHES, BATCHES):
            self.given = number + 1
            yield torch.full((2, 4), float(number))

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class BySet(torch.utils.data.Sampler):
    """In an order that depends on the epoch that it is told."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 2 * BATCHES

    def __iter__(self):
        return iter(torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loader(kind):
    if kind == "stateful":
        return Standing()
    if kind == "unknown length":
        return DataLoader(Endless(), 2)
    if kind == "sampler":
        return DataLoader(Noisy(), 2, sampler=BySet())
    own = torch.Generator().manual_seed(3) if "generator" in kind else None
    return DataLoader(Noisy(), 2, shuffle=True, generator=own, num_workers=2 * ("workers" in kind))


class Module(pl.LightningModule):
    """Sees what it is given, and draws random numbers of its own."""

    def __init__(self, kind):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 16))
        self.kind, self.seen = kind, []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, batch.tolist()))
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return loader(self.kind)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Validated(Module):
    def validation_step(self, batch, index):
        pass

    def val_dataloader(self):
        return DataLoader(torch.zeros(4, 4), 2)


def fit(make_trainer, module, seed, path=None, more=(), **options):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    watching = GBLRCallback(budget=0.5, layers=["net.2"], warmup=1, cooldown=7, **options)
    trainer = make_trainer(
        [watching, *more],
        max_epochs=EPOCHS,
        max_steps=-1,
        enable_checkpointing=bool(more),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, ckpt_path=path, weights_only=True)
    return module


KINDS = ["plain", "generator", "stateful", "unknown length", "sampler"]


@pytest.mark.parametrize("made", [Module, Validated])
@pytest.mark.parametrize("kind", KINDS)
def test_data_and_random_numbers_go_on_where_they_stopped(make_trainer, tmp_path, kind, made):
    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(tmp_path, filename="end{step:02d}", save_top_k=-1, every_n_epochs=1)
    torch.manual_seed(0)
    module = made(kind)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    fit(make_trainer, module, 0, more=[saved, ends])
    assert len(module.seen) == EPOCHS * BATCHES
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == EPOCHS * BATCHES + EPOCHS
    for file in files:
        done = int(file.stem[-2:])
        if done == EPOCHS * BATCHES or (kind == "unknown length" and file.stem == "step=04"):
            continue  # Lightning itself does not see then that the epoch is over
        again = made(kind)
        again.load_state_dict(before)
        fit(make_trainer, again, 99, file)
        assert again.seen == module.seen[done:], file.name
        for name, part in again.state_dict().items():
            assert torch.equal(part, module.state_dict()[name]), (file.name, name)


def test_workers_go_on_with_their_noise(make_trainer, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=3)
    module = fit(make_trainer, Module("generator and workers"), 0, more=[saved])
    for step in (3, 6):
        again = fit(make_trainer, Module("generator and workers"), 99, tmp_path / f"step={step:02d}.ckpt")
        assert again.seen == module.seen[step:]


def test_without_replay_data_begin_anew(make_trainer, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=6)
    module = fit(make_trainer, Module("sampler"), 0, more=[saved])
    again = fit(make_trainer, Module("sampler"), 99, tmp_path / "step=06.ckpt", replay=False)
    assert again.seen[0][2][0][0] == module.seen[BATCHES][2][0][0]  # the first of the epoch
    assert len(again.seen) == EPOCHS * BATCHES - 6


def test_fewer_data_than_there_were(make_trainer, tmp_path, monkeypatch):
    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=3)
    fit(make_trainer, Module("plain"), 0, more=[saved])
    again = Module("plain")
    monkeypatch.setattr(again, "train_dataloader", lambda: DataLoader(torch.rand(4, 4), 2))
    fit(make_trainer, again, 99, tmp_path / "step=03.ckpt")
    assert again.global_step > 3


def test_a_checkpoint_without_a_place_is_one_too(make_trainer, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=4)
    fit(make_trainer, Module("plain"), 0, more=[saved])
    path = tmp_path / "step=04.ckpt"
    content = torch.load(path, weights_only=True)
    assert content.pop("gblr_place")[0]["epoch"] == 1
    torch.save(content, path)
    assert len(fit(make_trainer, Module("plain"), 1, path).seen) == BATCHES


def test_modules_that_fetch_batches_themselves(make_trainer, tmp_path):
    class Fetching(Module):
        def training_step(self, dataloader_iter):
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    saved = ModelCheckpoint(tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=2)
    module = fit(make_trainer, Fetching("plain"), 0, more=[saved])
    again = fit(make_trainer, Fetching("plain"), 99, tmp_path / "step=06.ckpt")
    assert [rows for _, _, rows in again.seen] == [rows for _, _, rows in module.seen[6:]]
