"""GBLRCallback as an entry of a config of LightningCLI."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gblr_plugin
from gblr_plugin.lightning import GBLRCallback

pytest.importorskip("jsonargparse")

CONFIG = """\
trainer:
  max_epochs: 8
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: gblr_plugin.lightning.GBLRCallback
      init_args: {budget: 0.5, layers: [network.*], warmup: 2, cooldown: 0.5}
      dict_kwargs: {initialiser: gblr, picture_every_n_epochs: 0}
model: {width: 32}
"""


class Classifier(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.network(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)


def run(tmp_path) -> Any:
    import importlib

    cli = importlib.import_module(f"{pl.__name__}.cli").LightningCLI
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    return cli(Classifier, Data, args=arguments, save_config_callback=None)


def test_the_callback_of_a_config_learns_a_structure_within_its_budget(tmp_path):
    cli = run(tmp_path)
    (callback,) = (found for found in cli.trainer.callbacks if isinstance(found, GBLRCallback))
    assert callback.learner.frozen
    assert set(callback.learner.layers) == {"network.0", "network.2"}
    assert 0.4 < callback.learner.relative_flops <= 0.5
    model = gblr_plugin.convert(cli.model)
    assert isinstance(model.network[0].weight, gblr_plugin.GBLRTensor)
