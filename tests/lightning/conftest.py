from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any

import pytest

if importlib.util.find_spec("pytorch_lightning") is None:  # then the tests run with `lightning.pytorch`
    for _name in ("lightning.pytorch", "gblr_plugin.lightning"):  # the second has seen that it is not there
        importlib.import_module(_name)
    for _name, _module in list(sys.modules.items()):
        if _name.split(".")[:2] == ["lightning", "pytorch"]:
            sys.modules[_name.replace("lightning.pytorch", "pytorch_lightning", 1)] = _module

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(48, 16, generator=generator), torch.randint(4, (48,), generator=generator))


class Module(pl.LightningModule):
    """A small network on fixed random data; options say how it is optimised.

    ``by_step`` takes the batch of the step's number, not the loader's: Lightning does not restore a plain loader's
    position.
    """

    def __init__(
        self, schedule: str | None = None, manual: bool = False, two_optimizers: bool = False, by_step: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
        self.schedule = schedule
        self.by_step = by_step
        self.two_optimizers = two_optimizers
        self.automatic_optimization = not manual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.by_step:
            batch = data()[8 * (self.global_step % 6) :][:8]
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        if not self.automatic_optimization:
            optimizers = self.optimizers() if self.two_optimizers else [self.optimizers()]
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(), batch_size=8)  # 6 steps an epoch

    test_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        if self.two_optimizers:
            return (
                torch.optim.SGD(self.net[0].parameters(), lr=0.05, momentum=0.9),
                torch.optim.AdamW([*self.net[2].parameters(), *self.net[4].parameters()], lr=0.01),
            )
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.schedule is None:
            return optimizer
        schedulers = torch.optim.lr_scheduler
        made = {
            "onecycle": lambda: schedulers.OneCycleLR(optimizer, 0.02, total_steps=40),
            "lambda": lambda: schedulers.LambdaLR(optimizer, [lambda step: 0.97**step]),
            "sequential": lambda: schedulers.SequentialLR(
                optimizer,
                [schedulers.LinearLR(optimizer, total_iters=4), schedulers.CosineAnnealingLR(optimizer, 30)],
                milestones=[4],
            ),
        }[self.schedule]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


@pytest.fixture
def make_module():
    return Module


@pytest.fixture
def make_trainer(tmp_path):
    def make(callbacks: list[Any], **options: Any) -> pl.Trainer:
        settings = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "max_steps": 20,
            "log_every_n_steps": 5,
        }
        return pl.Trainer(callbacks=callbacks, **(settings | options))

    return make


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
        yield
