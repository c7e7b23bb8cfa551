"""Hosts are as before once our objects are gone; what runs side by side shares nothing; versions are checked."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import sys
import threading
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.utils.optional_imports import check_version


def attributes_of(*modules: str) -> dict[str, int]:
    """Identity of each function and class of the modules, and of each attribute of these classes."""
    found = {}
    for module in modules:
        for name, value in vars(importlib.import_module(module)).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module}.{name}"] = id(value)
            if inspect.isclass(value):
                for attribute, inner in vars(value).items():
                    if callable(inner) or isinstance(inner, (property, staticmethod, classmethod)):
                        found[f"{module}.{name}.{attribute}"] = id(inner)
    return found


TORCH = ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.optim.lr_scheduler", "torch.nn.utils")
NNI = (
    "nni.compression",
    "nni.compression.base.compressor",
    "nni.compression.base.wrapper",
    "nni.compression.base.config",
    "nni.compression.base.target_space",
    "nni.compression.pruning",
    "nni.compression.utils.evaluator",
)
LIGHTNING = (
    "pytorch_lightning",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.core.module",
    "pytorch_lightning.core.optimizer",
    "pytorch_lightning.trainer.trainer",
)


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))


def batches(width: int = 16, count: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, width, generator=generator) for _ in range(count)]


def nni_pruner(model: nn.Module, budget: float) -> Any:
    import nni
    from nni.compression.utils import TorchEvaluator

    def train(model: nn.Module, optimizer: Any, step: Any, *_: Any, **__: Any) -> None:
        for x in batches():
            optimizer.zero_grad()
            step(x, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.AdamW)(model.parameters(), lr=1e-2)
    evaluator = TorchEvaluator(train, optimizer, lambda x, model: (model(x) - x).square().mean())
    config = [{"op_names": ["0", "2"], "sparse_ratio": 1 - budget}]
    return gblr.nni.GBLRPruner(model, config, evaluator, 1, 8)


def lightning_fit(model: nn.Module, budget: float) -> Any:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
            return (self.net(x) - x).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8)

    callback = gblr.lightning.GBLRCallback(budget, warmup=1, cooldown=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[callback], **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module())
    return callback, trainer


def test_after_the_pruner_nni_and_torch_are_as_before() -> None:
    import gblr_plugin.nni  # noqa: F401  # what importing registers is there for good, and said in its docstring

    lightning_fit(network(9), 0.5)  # torch and NNI cache a little at their first use
    nni_pruner(network(9), 0.5).compress(12, None)
    before = attributes_of(*TORCH, *NNI)
    model = network()
    pruner = nni_pruner(model, 0.5)
    pruner.compress(12, None)
    pruner.unwrap_model()
    del pruner
    gc.collect()
    after = attributes_of(*TORCH, *NNI)
    assert after == before
    assert len(before) > 1000
    assert not any("forward" in vars(module) for module in model.modules())


def test_after_the_callback_lightning_and_torch_are_as_before() -> None:
    lightning_fit(network(9), 0.5)
    before = attributes_of(*TORCH, *LIGHTNING)
    model = network()
    callback, trainer = lightning_fit(model, 0.5)
    assert "step" not in vars(trainer.optimizers[0])
    del callback, trainer
    gc.collect()
    after = attributes_of(*TORCH, *LIGHTNING)
    assert after == before
    assert len(before) > 500
    assert not any(hook for module in model.modules() for hook in (module._forward_hooks, module._backward_hooks))


# -- side by side ------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def learner_of(seed: int, budget: float) -> tuple[nn.Module, torch.optim.Optimizer, gblr.StructureLearner]:
    model = network(seed)
    layers = gblr.prepare(model)
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    goals = {name: gblr.LayerGoal(budget=budget, group=0) for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(1, 8))
    learner.attach_all([optimizer])
    return model, optimizer, learner


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()


def test_two_learners_in_turns_learn_what_each_learns_alone() -> None:
    alone = []
    for seed, budget in ((0, 0.3), (1, 0.7)):
        model, optimizer, _ = learner_of(seed, budget)
        for x in batches():
            take_step(model, optimizer, x)
        alone.append(weights(model))
    both = [learner_of(0, 0.3), learner_of(1, 0.7)]
    for x in batches():
        for model, optimizer, _ in both:
            take_step(model, optimizer, x)
    for expected, (model, _, learner) in zip(alone, both, strict=True):
        assert_same(weights(model), expected)
        assert learner.step_count == 12


def test_two_pruners_and_two_trainers() -> None:
    alone = []
    for seed, budget in ((0, 0.3), (1, 0.7)):
        model = network(seed)
        nni_pruner(model, budget).compress(12, None)
        alone.append(weights(model))
    models = [network(0), network(1)]
    pruners = [nni_pruner(model, budget) for model, budget in zip(models, (0.3, 0.7), strict=True)]
    for pruner in reversed(pruners):
        pruner.compress(12, None)
    for model, expected in zip(models, alone, strict=True):
        assert_same(weights(model), expected)
    kept = lightning_fit(network(0), 0.3)  # the first trainer stays alive
    model = network(1)
    second, _ = lightning_fit(model, 0.7)
    again = network(1)
    lightning_fit(again, 0.7)
    assert_same(weights(model), weights(again))
    assert kept[0].learner is not second.learner
    assert kept[0].learner.relative_flops <= 0.3 < second.learner.relative_flops <= 0.7


def test_threads_that_convert_different_models() -> None:
    x = torch.randn(5, 48)

    def finished(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 48))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 7)
        gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.4))
        before = model(x).detach()
        return before, gblr.convert(model, plan="fixed")(x).detach()

    expected = {seed: finished(seed) for seed in range(8)}
    found: dict[int, Any] = {}

    def work(seeds: range) -> None:
        for seed in seeds:
            try:
                found[seed] = finished(seed)
            except BaseException as error:  # a thread's error would only be printed
                found[seed] = error

    threads = [threading.Thread(target=work, args=(range(start, 8, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for seed, (before, after) in expected.items():
        assert not isinstance(found[seed], BaseException), found[seed]
        torch.testing.assert_close(found[seed][0], before)
        torch.testing.assert_close(found[seed][1], after)


def test_a_copy_shares_nothing_with_its_original() -> None:
    model, optimizer, _ = learner_of(0, 0.4)
    twin = copy.deepcopy(model)
    before = weights(twin)
    for x in batches():
        take_step(model, optimizer, x)
    assert_same(weights(twin), before)


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(name: str, version: str) -> None:
        real = metadata.version
        monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else real(asked))

    return pretend


BRIDGES = [
    ("torch", "2.12.1+cu126", "gblr_plugin.layers.base", "gblr_plugin needs torch>=2.13,<2.14, and torch 2.12.1+cu126"),
    (
        "torchao",
        "0.17.0",
        "gblr_plugin.tensor._compat",
        "gblr_plugin.GBLRTensor needs torchao>=0.18,<0.19, and torchao 0.17",
    ),
    ("nni", "2.10", "gblr_plugin.nni", "gblr_plugin.nni needs nni>=3.0,<4, and nni 2.10"),
    ("pytorch-lightning", "1.9.5", "gblr_plugin.lightning.base", "gblr_plugin.lightning needs pytorch-lightning>=2.6"),
    (
        "transformers",
        "5.13.1",
        "gblr_plugin.huggingface.folders",
        "gblr_plugin.huggingface.folders needs transformers>=5.14,<6, and transformers 5.13.1",
    ),
    ("numba", "0.61.2", "gblr_plugin.kernels.cpu.simd", "gblr_plugin.kernels needs numba>=0.62,<1, and numba 0.61.2"),
]


@pytest.mark.parametrize(("name", "version", "module", "says"), BRIDGES, ids=[bridge[0] for bridge in BRIDGES])
def test_an_older_host_is_one_line_at_the_import_of_its_bridge(
    installed: Any, monkeypatch: pytest.MonkeyPatch, name: str, version: str, module: str, says: str
) -> None:
    installed(name, version)
    package, _, last = module.rpartition(".")
    parent = importlib.import_module(package)
    monkeypatch.setattr(parent, last, getattr(parent, last, None), raising=False)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(module)
    assert str(caught.value).startswith(says)
    assert "pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_host_is_warned_of(installed: Any) -> None:
    installed("nni", "4.0")
    with pytest.warns(UserWarning, match="gblr_plugin.nni was tested with nni>=3.0,<4, and nni 4.0 is installed"):
        check_version("gblr_plugin.nni", "nni>=3.0,<4")


@pytest.mark.parametrize("version", ["3.0", "3.0.1", "3.9rc1", "3.0.0+local"])
def test_versions_within_the_range_say_nothing(installed: Any, version: str, recwarn: Any) -> None:
    installed("nni", version)
    check_version("gblr_plugin.nni", "nni>=3.0,<4")
    assert not recwarn.list


def test_a_host_that_is_not_installed_is_no_matter_here() -> None:
    check_version("gblr_plugin", "no-such-package-anywhere>=1,<2")
    with pytest.raises(ValueError, match="no range of versions"):
        check_version("gblr_plugin", "nni")


@pytest.mark.parametrize(
    "wanted", ["torch>=2.13,<2.14", "torchao>=0.18,<0.19", "nni>=3.0,<4", "pytorch-lightning>=2.6,<2.7"]
)
def test_the_ranges_are_those_of_the_package(wanted: str) -> None:
    root = Path(__file__).parents[2]
    assert f'"{wanted}"' in (root / "pyproject.toml").read_text()
