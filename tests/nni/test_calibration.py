"""Training batches from evaluators, and starts that are fitted to them."""

from __future__ import annotations

from typing import Any

import nni
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gblr_plugin import ConfigError
from gblr_plugin.calibration.batches import CalibrationSettings
from gblr_plugin.nni import GBLRPruner, LightningEvaluator, create_compressor
from gblr_plugin.nni.calibration import calibration_data
from gblr_plugin.nni.settings import read_config


class Module(pl.LightningModule):
    """Has batch statistics and dropout, and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 24)
        self.head, self.dropout = nn.Linear(24, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.dropout(F.relu(self.fc2(F.relu(self.norm(self.fc1(x)))))))
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return nni.trace(torch.optim.AdamW)(self.parameters(), lr=1e-2)


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        g = torch.Generator().manual_seed(1)
        self.pairs = TensorDataset(torch.randn(96, 16, generator=g), torch.randint(4, (96,), generator=g))

    def train_dataloader(self) -> Any:
        return DataLoader(self.pairs, 16, shuffle=True)


def lightning_evaluator() -> LightningEvaluator:
    trainer = nni.trace(pl.Trainer)(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    return LightningEvaluator(trainer, nni.trace(Data)())


@pytest.mark.parametrize("host", ["torch", "lightning"])
def test_batches_are_seen_and_nothing_is_changed(kit: Any, host: str) -> None:
    if host == "torch":
        model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 4))
        evaluator = kit.evaluator(model, scheduler=lambda o: nni.trace(torch.optim.lr_scheduler.StepLR)(o, 1))
    else:
        model, evaluator = Module(), lightning_evaluator()
    evaluator._init_optimizer_helpers(model)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    data = calibration_data(evaluator, model, CalibrationSettings(batches=3, damping=0.01, sequential=False))
    assert len(data.batches) == 3
    assert (data.damping, data.sequential) == (0.01, False)
    assert not torch.equal(data.batches[0][0], data.batches[1][0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    x, y = data.batches[2]
    torch.testing.assert_close(data.forward(model, data.batches[2]), F.cross_entropy(model(x), y))


CONFIG = [
    {
        "op_names": ["fc1", "fc2"],
        "sparse_ratio": 0.6,
        "global_group_id": "all",
        "min_sparse_ratio": 0.1,
        "gblr": {"initialiser": "trapezoid", "allocation": "sensitivity"},
    }
]


def output_errors(model: nn.Module, compressed: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x) - compressed.eval()(x)).norm() / model(x).norm())


@pytest.mark.parametrize("name", ["gblr", "low_rank", "monarch", "gblr_fixed", "agp"])
def test_compressors_start_closer_to_the_dense_network(kit: Any, name: str) -> None:
    reference = kit.MLP(48)
    x = torch.cat([batch[0] for batch in kit.make_batches()])
    with torch.no_grad():  # inputs of very unequal variance, which only activations tell of
        reference.fc1.weight[::3] *= 8
    schedule = {"gblr": {"cooldown_begin_step": 4}, "agp": {"interval_steps": 2, "total_times": 2}}.get(name, {})
    plain = [{"op_names": ["fc2"], "sparse_ratio": 0.6, "gblr": {"initialiser": "trapezoid"}}]
    errors = []
    for calibration in (None, {"batches": 4, "sequential": True}):
        model = kit.MLP(48)
        model.load_state_dict(reference.state_dict())
        create_compressor(name, model, plain, kit.evaluator(model), calibration=calibration, **schedule)
        errors.append(output_errors(reference, model, x))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", ["gblr", "low_rank"])
def test_a_group_starts_at_allocated_budgets(name: str) -> None:
    model = Module()
    with torch.no_grad():
        model.head.weight.mul_(30)
    compressor = create_compressor(
        name,
        model,
        CONFIG,
        lightning_evaluator(),
        calibration=True,
        **({"cooldown_begin_step": 4} if name == "gblr" else {}),
    )
    sizes = {"fc1": 24 * 16, "fc2": 24 * 24}
    flops = {layer: getattr(model, layer).relative_flops for layer in sizes}
    assert sum(sizes[layer] * flops[layer] for layer in sizes) <= 0.4 * sum(sizes.values())
    assert abs(flops["fc1"] - flops["fc2"]) > 0.02
    compressor.compress(6, None)


def test_settings_and_errors(kit: Any) -> None:
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    ask = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5, "global_group_id": 1, "gblr": {"allocation": "output"}}]

    def refused(match: str, config: Any = ask, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            GBLRPruner(model, config, cooldown_begin_step=4, **options)
        assert type(model.fc1) is nn.Linear

    refused("allocation must be one of uniform, weight", [{**ask[0], "gblr": {"allocation": "fair"}}])
    refused("'fc1': allocation splits the budget of a group", [{**ask[0], "global_group_id": None}])
    refused("it needs sparse_ratio", [{"op_names": ["fc1"], "sparse_threshold": 0.1, "gblr_allocation": "weight"}])
    refused("rule 'output' needs calibration batches", evaluator=evaluator)
    refused("initialiser that starts at a budget", evaluator=evaluator, calibration=True)
    refused("it takes training batches from the evaluator", calibration=True)
    refused("calibration: unknown key 'batch'", calibration={"batch": 3}, evaluator=evaluator)
    refused("calibration: batches must be a whole number", calibration={"batches": 0}, evaluator=evaluator)
    two = [{**ask[0], "op_names": ["fc1"]}, {**ask[0], "op_names": ["fc2"], "gblr": {"allocation": "weight"}}]
    refused("but not one allocation", two)
    assert read_config(model, ask).layers["fc1"].allocation == "output"


def test_groups_are_split_by_sensitivity_where_there_are_batches(kit: Any) -> None:
    def flops(family: str, gblr: dict[str, Any], calibration: bool) -> list[float]:
        torch.manual_seed(0)
        model = kit.MLP(48)
        entry = {"op_names": ["fc1", "fc2"], "sparse_ratio": 0.6, "global_group_id": 1, "gblr": gblr}
        create_compressor(family, model, [entry], kit.evaluator(model), calibration=calibration)
        return [model.fc1.relative_flops, model.fc2.relative_flops]

    weighed = flops("low_rank", {"allocation": "sensitivity"}, True)
    assert flops("low_rank", {}, True) == weighed
    assert flops("low_rank", {}, False) == flops("low_rank", {"allocation": "uniform"}, True) != weighed
    assert flops("alds", {}, True) == flops("alds", {}, False)  # its own allocation is part of it
