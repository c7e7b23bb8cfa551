"""The way that NNI's users go, on a network with all that NNI looks at: both evaluators, every schedule and config."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import nni
import pytest
import torch
from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner
from nni.compression.quantization import LsqQuantizer
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import Evaluator, LightningEvaluator, TorchEvaluator, auto_set_denpendency_group_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import gblr_plugin
from gblr_plugin import GBLRLinear
from gblr_plugin.nni import GBLRPruner, create_compressor


class Network(nn.Module):
    """A convolution into two others, one of them grouped, whose sum goes into two linear layers; norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.norm1 = nn.Conv2d(8, 16, 3, groups=4), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(16 * 6 * 6, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(self.norm1(self.grouped(x)) + self.norm2(self.conv(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def images(count: int = 64) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images[:count, None] / 16, dtype=torch.float32), torch.tensor(digits.target[:count])


def loss_of(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loop(
    model: nn.Module,
    optimizer: Any,
    step: Any,
    scheduler: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    batches = list(DataLoader(TensorDataset(*images()), batch_size=16))
    for index in range(max_steps or max_epochs * len(batches)):
        optimizer.zero_grad()
        step(batches[index % len(batches)], model).backward()
        optimizer.step()
        if scheduler is not None and index % len(batches) == len(batches) - 1:
            scheduler.step()


def sgd(model: nn.Module) -> Any:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def lightning() -> tuple[nn.Module, Evaluator, str]:
    pl = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(batch, self)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            return {"optimizer": optimizer, "lr_scheduler": nni.trace(ExponentialLR)(optimizer, 0.9)}

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*images()), batch_size=16)

    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = nni.trace(pl.Trainer)(accelerator="cpu", logger=False, max_epochs=1, max_steps=3, **quiet)
    return Module(), LightningEvaluator(trainer, nni.trace(Data)()), "net."


def plain_torch() -> tuple[nn.Module, Evaluator, str]:
    model = Network()
    optimizer = sgd(model)
    return model, TorchEvaluator(loop, optimizer, loss_of, nni.trace(ExponentialLR)(optimizer, 0.9)), ""


EVALUATORS = {"lightning": lightning, "torch": plain_torch}
LAYERS = ("stem", "conv", "fc1")


def config(prefix: str) -> list[dict[str, Any]]:
    return [
        {"op_types": ["Linear"], "exclude_op_names": [f"{prefix}fc2"], "sparse_ratio": 0.6},
        {"op_names": [f"{prefix}stem", f"{prefix}conv"], "sparse_ratio": 0.5, "granularity": "out_channel"},
    ]


def check(model: nn.Module, masks: dict[str, dict[str, Tensor]], prefix: str) -> None:
    """Budgets are met, masks show where the weights live, and the converted network computes the same."""
    assert set(masks) == {prefix + name for name in LAYERS}
    for name, budget in zip(LAYERS, (0.5, 0.5, 0.4), strict=True):
        layer, mask = model.get_submodule(prefix + name), masks[prefix + name]["weight"]
        assert budget - 0.1 < layer.relative_flops <= budget
        assert mask.shape == (layer.to_dense() if name == "fc1" else layer.weight).shape
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert not layer.weight[mask == 0].any()
        assert not hasattr(layer, "_nni_wrapper")
    x = images()[0]
    before = model.eval()(x)
    total = gblr_plugin.report(model, x)
    torch.testing.assert_close(gblr_plugin.convert(model)(x), before, rtol=1e-4, atol=1e-4)
    assert gblr_plugin.report(model, x).multiply_adds == total.multiply_adds


# -- evaluators and schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", [None, AGPPruner, LinearPruner])
@pytest.mark.parametrize("make", EVALUATORS.values(), ids=EVALUATORS.keys())
def test_evaluators_and_schedules(make: Any, driver: Any) -> None:
    model, evaluator, prefix = make()
    listed = auto_set_denpendency_group_ids(model, config(prefix), images()[0])
    if driver is None:
        pruner = outer = GBLRPruner(model, listed, evaluator, warmup_step=2, cooldown_begin_step=18)
    else:
        pruner = GBLRPruner(model, listed, evaluator)
        outer = driver(pruner, interval_steps=2, total_times=9)
    compressed, masks = outer.compress(20, None)
    assert compressed is model
    assert pruner.learner.step_count == 20
    outer.unwrap_model()
    for name, targets in outer.get_masks().items():
        assert torch.equal(targets["weight"], masks[name]["weight"])
    check(model, masks, prefix)


# -- shapes of a config list -------------------------------------------------------------------------------------------

SHAPES: dict[str, list[dict[str, Any]]] = {
    "names": [
        {"op_names": ["fc1"], "sparse_ratio": 0.6},
        {"op_names": ["stem", "conv"], "sparse_ratio": 0.5},
    ],
    "types": [
        {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.6},
        {"op_types": ["Conv2d"], "exclude_op_names": ["grouped"], "sparse_ratio": 0.5},
    ],
    "patterns": [
        {"op_names_re": ["fc1"], "sparse_ratio": 0.6},
        {"op_names_re": [".*"], "exclude_op_names_re": ["fc.*", "gr.*"], "op_types": ["Conv2d"], "sparse_ratio": 0.5},
    ],
    "targets": [
        {"op_names": ["fc1"], "target_names": ["weight", "bias"], "target_settings": {"weight": {"sparse_ratio": 0.6}}},
        {"op_names": ["stem", "conv"], "target_names": ["weight"], "sparse_ratio": 0.5},
    ],
    "old": [
        {"op_types": ["Linear"], "sparsity": 0.6},
        {"op_types": ["Conv2d"], "sparsity_per_layer": 0.5},
        {"op_names": ["fc2", "grouped"], "exclude": True},
    ],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_of_a_config_list(shape: list[dict[str, Any]]) -> None:
    model, evaluator, _ = plain_torch()
    pruner = GBLRPruner(model, shape, evaluator, 1, 10)
    _, masks = pruner.compress(12, None)
    pruner.unwrap_model()
    check(model, masks, "")


# -- everything at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVALUATORS.values(), ids=EVALUATORS.keys())
def test_a_distiller_then_gblr_then_a_quantizer(make: Any) -> None:
    model, evaluator, prefix = make()
    teacher = copy.deepcopy(model).eval()
    distil = [{"op_names": [prefix + name for name in LAYERS], "lambda": 0.75, "apply_method": "mse"}]
    # By name: it is the first to be given the evaluator, and cures it.
    options = {"teacher_model": teacher, "teacher_predict": lambda batch, net: net(batch[0])}
    distiller = create_compressor("dynamic_distiller", model, distil, evaluator, **options)
    pruner = GBLRPruner.from_compressor(distiller, config(prefix), 2, 18)
    quantize = [
        {"op_names": [f"{prefix}fc1", f"{prefix}fc2"], "quant_dtype": "int8"},
        {
            "op_names": [f"{prefix}stem", f"{prefix}grouped", f"{prefix}conv"],
            "quant_dtype": "int8",
            "fuse_names": [
                (f"{prefix}stem", f"{prefix}norm0"),
                (f"{prefix}grouped", f"{prefix}norm1"),
                (f"{prefix}conv", f"{prefix}norm2"),
            ],
        },
    ]
    quantizer = LsqQuantizer.from_compressor(pruner, quantize)
    before = model.get_submodule(f"{prefix}norm2").running_mean.clone()
    _, scales = quantizer.compress(20, None)
    assert pruner.learner.step_count == 20
    assert isinstance(model.get_submodule(f"{prefix}fc1"), GBLRLinear)
    assert set(scales[f"{prefix}conv"]) == {"_input_0", "_output_0"}  # a structured layer: activations alone
    assert "weight" in scales[f"{prefix}grouped"]  # a dense one: its weight too
    assert not torch.equal(model.get_submodule(f"{prefix}norm2").running_mean, before)
    quantizer.unwrap_model()
    check(model, pruner.get_masks(), prefix)


# -- speedup -----------------------------------------------------------------------------------------------------------


def test_gblr_after_a_pruner_whose_channels_were_cut_out() -> None:
    """NNI's ModelSpeedup cuts out what its own pruners masked; gblr's layers get faster by convert alone."""
    torch.manual_seed(0)
    model, x = Network(), images()[0]
    # ModelSpeedup's own tracer knows no torch as new as ours; it takes a graph that torch traced.
    cut = L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": "out_channel"}])
    _, masks = cut.compress()
    cut.unwrap_model()
    small = ModelSpeedup(model, x, masks, graph_module=torch.fx.symbolic_trace(model)).speedup_model()
    assert small.fc1.out_features == 16
    evaluator = TorchEvaluator(loop, sgd(small), loss_of)
    pruner = GBLRPruner(small, config(""), evaluator, 2, 18)
    _, masks = pruner.compress(20, None)
    pruner.unwrap_model()
    assert masks["fc1"]["weight"].shape == (16, 576)
    check(small, masks, "")
