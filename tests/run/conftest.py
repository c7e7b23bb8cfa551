import pytest

CONFIG = """\
task: digits_vit
budget: 0.5
model: {dim: 16, depth: 1, heads: 2, held_out: 0.5}
seeds: [0]
dense: {epochs: 1, batch_size: 128}
finetune: {epochs: 2, batch_size: 128}
methods:
  - {name: gblr}
latency_batch: [1]
"""

USER_TASK = '''
import os

import torch
from torch import nn

from gblr_plugin.tasks.base import ClassifierModule, PairsDataModule


class Stop(nn.Module):
    """Raises in the training of the dense network, or of the compressed one."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls == int(os.environ.get("STOP_AT", 0)):
                raise RuntimeError("the disk\\nis on fire")
        return x


class Task:
    metric = "accuracy"
    higher_is_better = True
    layers = ["network.*"]

    def __init__(self, nan=False, width=32):
        self.nan, self.width = nan, width

    def network(self):
        network = nn.Sequential(nn.Linear(8, self.width), Stop(), nn.ReLU(), nn.Linear(self.width, 2))
        if self.nan:
            with torch.no_grad():
                network[0].weight[0, 0] = float("nan")
        return network

    def module(self, network, training, steps):
        return ClassifierModule(network, training, self.metric, steps)

    def data(self, seed, batch_size):
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(seed))
        pairs = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        train, held_out = torch.utils.data.random_split(pairs, [64, 32], torch.Generator().manual_seed(seed))
        return PairsDataModule(train, held_out, batch_size, seed)

    def example_input(self, batch=1):
        return torch.zeros(batch, 8)


class Judged(Task):
    metric = "beauty"


number = 3
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with a config of the digits and a user's own task."""
    import sys

    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "own_task.py").write_text(USER_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_task", None)
