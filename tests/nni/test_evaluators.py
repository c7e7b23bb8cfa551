from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import nni
import pytest
import torch
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner
from nni.compression.utils import LightningEvaluator as PlainEvaluator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from gblr_plugin import ConfigError
from gblr_plugin.nni import GBLRPruner, LightningEvaluator, create_compressor
from gblr_plugin.nni.evaluators import cure, record_optimizers

CONFIG = [{"op_names": ["net.fc1", "net.fc2"], "sparse_ratio": 0.6}]


class Counting(PlainEvaluator):
    """What a user derives from NNI's evaluator."""

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        self.asked = [*getattr(self, "asked", []), (max_steps, max_epochs)]
        super().train(max_steps, max_epochs)


class CountingTwice(Counting):
    """And what somebody derives from that."""

    def _init_optimizer_helpers(self, pure_model: Any) -> None:
        self.recorded = True
        super()._init_optimizer_helpers(pure_model)


KINDS: dict[str, tuple[str, type]] = {
    "pytorch_lightning": ("pytorch_lightning", LightningEvaluator),
    "lightning.pytorch": ("lightning.pytorch", LightningEvaluator),
    "of NNI": ("pytorch_lightning", PlainEvaluator),
    "of a user": ("pytorch_lightning", CountingTwice),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> tuple[str, type]:
    return request.param


@pytest.fixture
def pl(kind: tuple[str, type]) -> Any:
    name = kind[0]
    try:
        package = importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")
    logging.getLogger(name.partition(".")[0]).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return package


class Lightning:
    """What a user of one Lightning package writes."""

    def __init__(self, pl: Any, kit: Any, kind: type) -> None:
        self.pl, self.kit, self.kind = pl, kit, kind
        data = [torch.cat(part) for part in zip(*kit.make_batches(), strict=True)]

        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return DataLoader(TensorDataset(*data), batch_size=16)

            def test_dataloader(self) -> Any:
                return DataLoader(TensorDataset(*data), batch_size=16)

        class Module(pl.LightningModule):
            def __init__(self, returns: Any) -> None:
                super().__init__()
                self.net = kit.MLP()
                self.returns = returns

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: Any, index: int) -> Tensor:
                return F.cross_entropy(self(batch[0]), batch[1])

            def test_step(self, batch: Any, index: int) -> None:
                self.log("default", F.cross_entropy(self(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                return self.returns(self)

        self.data, self.module = Data, Module

    def evaluator(self, **options: Any) -> Any:
        quiet = {
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "logger": False,
        }
        trainer = nni.trace(self.pl.Trainer)(accelerator="cpu", **quiet, **{"max_epochs": 2, **options})
        return self.kind(trainer, nni.trace(self.data)())


@pytest.fixture
def lit(pl: Any, kit: Any, kind: tuple[str, type]) -> Lightning:
    return Lightning(pl, kit, kind[1])


def adamw(module: nn.Module) -> Any:
    return nni.trace(torch.optim.AdamW)(module.parameters(), lr=1e-2)


def with_scheduler(make: Any) -> Any:
    def returns(module: nn.Module) -> Any:
        optimizer = adamw(module)
        return make(optimizer, nni.trace(lr_scheduler.LambdaLR)(optimizer, [lambda step: 0.5]))

    return returns


RETURNS = {
    "optimizer": adamw,
    "list": lambda module: [adamw(module)],
    "table": lambda module: {"optimizer": adamw(module)},
    "table, no scheduler": lambda module: {"optimizer": adamw(module), "lr_scheduler": None},
    "table with scheduler": with_scheduler(lambda o, s: {"optimizer": o, "lr_scheduler": s}),
    "table with table": with_scheduler(
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}
    ),
    "tuple of tables": with_scheduler(lambda o, s: ({"optimizer": o, "lr_scheduler": s},)),
    "two lists": with_scheduler(lambda o, s: ([o], [s])),
    "two lists, table": with_scheduler(lambda o, s: ([o], [{"scheduler": s, "interval": "step"}])),
}


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS.keys())
def test_every_form_of_configure_optimizers(lit: Lightning, returns: Any) -> None:
    model = lit.module(returns)
    pruner = GBLRPruner(model, CONFIG, lit.evaluator(), warmup_step=2, cooldown_begin_step=10)
    _, masks = pruner.compress(12, None)
    assert pruner.learner.step_count == 12
    assert pruner.learner.frozen
    assert 0.39 <= pruner.learner.relative_flops <= 0.4
    assert masks["net.fc1"]["weight"].shape == (24, 16)
    assert "configure_optimizers" not in {key for key in vars(model) if vars(model)[key] is None}


def test_epochs_steps_and_the_trainers_own_duration(lit: Lightning) -> None:
    for arguments, options, steps in (
        ((None, 3), {}, 12),
        ((11, None), {"max_epochs": 1}, 11),
        ((11, 2), {}, 8),
        ((None, 3), {"max_steps": 2}, 12),
    ):
        model = lit.module(adamw)
        pruner = GBLRPruner(model, CONFIG, lit.evaluator(**options), 1, 6)
        pruner.compress(*arguments)
        assert pruner.learner.step_count == steps
    evaluator = lit.evaluator(max_epochs=2)
    pruner = GBLRPruner(lit.module(adamw), CONFIG, evaluator, 1, 6)
    evaluator.bind_model(pruner.bound_model, pruner._get_param_names_map())
    pruner._fuse_preprocess(evaluator)
    evaluator.finetune()
    assert pruner.learner.step_count == 8


def test_accumulated_gradients_are_one_step(lit: Lightning) -> None:
    pruner = GBLRPruner(lit.module(adamw), CONFIG, lit.evaluator(accumulate_grad_batches=2), 2, 10)
    pruner.compress(12, None)
    assert pruner.learner.step_count == 12
    assert pruner.learner.frozen


def test_several_optimizers_by_hand(lit: Lightning) -> None:
    class ByHand(lit.module):
        def __init__(self) -> None:
            super().__init__(None)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            parts = [self.net.fc3.parameters(), [*self.net.fc1.parameters(), *self.net.fc2.parameters()]]
            return [nni.trace(torch.optim.AdamW)(part, lr=1e-2) for part in parts]

        def training_step(self, batch: Any, index: int) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

    pruner = GBLRPruner(ByHand(), CONFIG, lit.evaluator(), 2, 10)
    pruner.compress(None, 3)
    assert pruner.learner.step_count == 12
    assert 0.39 <= pruner.learner.relative_flops <= 0.4


def test_agp_and_a_distiller_under_lightning(lit: Lightning) -> None:
    teacher, model = lit.module(adamw), lit.module(adamw)
    teacher.load_state_dict(model.state_dict())

    def predict(batch: Any, net: nn.Module) -> Tensor:
        return net(batch[0])

    distil = [{"op_names": ["net.fc1"], "lambda": 1.0, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller(model, distil, lit.evaluator(), teacher, predict)
    pruner = GBLRPruner.from_compressor(distiller, CONFIG)
    outer = AGPPruner(pruner, 1, 9)
    outer.compress(12, None)
    assert pruner.learner.frozen
    assert 0.39 <= pruner.learner.relative_flops <= 0.4
    outer.unwrap_model()
    model(lit.kit.make_batches(1)[0][0])


def test_nothing_is_left_on_the_module(lit: Lightning) -> None:
    model = lit.module(adamw)
    before = set(vars(model))
    pruner = GBLRPruner(model, CONFIG, lit.evaluator(), 1, 5)
    assert set(vars(model)) == before
    pruner.compress(6, None)
    pruner.unwrap_model()
    assert model.configure_optimizers.__func__ is type(model).configure_optimizers
    assert model.training_step.__func__ is type(model).training_step


def test_evaluate(lit: Lightning) -> None:
    evaluator = lit.evaluator()
    pruner = GBLRPruner(lit.module(adamw), CONFIG, evaluator, 1, 5)
    pruner.compress(6, None)
    evaluator.bind_model(pruner.bound_model, pruner._get_param_names_map())
    metric, _ = evaluator.evaluate()
    assert metric > 0


def test_a_training_in_two_parts_goes_on_where_the_first_ended(lit: Lightning) -> None:
    pruner = GBLRPruner(lit.module(adamw), CONFIG, lit.evaluator(), 2, 14)
    pruner.compress(None, 2)
    assert (pruner.learner.step_count, pruner.learner.frozen) == (8, False)
    pruner.compress(8, None)
    assert (pruner.learner.step_count, pruner.learner.frozen) == (16, True)


def test_a_training_resumes_in_another_process(lit: Lightning) -> None:
    pruner = GBLRPruner(lit.module(adamw), CONFIG, lit.evaluator(), 2, 14)
    pruner.compress(None, 2)
    saved = pruner.bound_model.state_dict(), pruner.learner.state_dict()
    later = GBLRPruner(lit.module(adamw), CONFIG, lit.evaluator(), 2, 14)
    later.bound_model.load_state_dict(saved[0])
    later.learner.load_state_dict(saved[1])
    later.compress(8, None)
    assert (later.learner.step_count, later.learner.frozen) == (16, True)
    assert 0.39 <= later.learner.relative_flops <= 0.4


def test_other_compressors_by_name_get_it_cured_too(lit: Lightning) -> None:
    returns = RETURNS["table with scheduler"]
    taylor = create_compressor("taylor", lit.module(returns), CONFIG, lit.evaluator(), training_steps=3)
    _, masks = taylor.compress(None, None)
    assert float(masks["net.fc1"]["weight"].mean()) == pytest.approx(0.4, abs=0.03)
    low_rank = create_compressor("low_rank", lit.module(returns), CONFIG, evaluator := lit.evaluator(max_epochs=1))
    low_rank.compress(6, None)
    assert isinstance(evaluator, LightningEvaluator)


def test_what_a_user_derives_keeps_its_own_methods(lit: Lightning) -> None:
    if not issubclass(lit.kind, CountingTwice):
        pytest.skip("the evaluator is not a user's")
    evaluator = lit.evaluator(max_epochs=1)
    pruner = GBLRPruner(lit.module(RETURNS["table with scheduler"]), CONFIG, evaluator, 2, 10)
    pruner.compress(12, None)
    assert pruner.learner.step_count == 12
    assert evaluator.recorded
    assert evaluator.asked == [(12, None)]
    assert isinstance(evaluator, CountingTwice)
    assert type(evaluator).__name__ == "CountingTwice"


def test_curing_leaves_classes_and_other_evaluators_alone(lit: Lightning) -> None:
    before = dict(vars(PlainEvaluator))
    cured, other = lit.evaluator(), lit.evaluator()
    cure(cured)
    kind = type(cured)
    cure(cured)
    assert type(cured) is kind
    assert type(other) is lit.kind
    assert dict(vars(PlainEvaluator)) == before
    cure(None)


def test_nnis_own_evaluator_takes_pytorch_lightning_only(lit: Lightning) -> None:
    if lit.pl.__name__ == "pytorch_lightning":
        pytest.skip("a trainer that NNI accepts")
    lit.kind = PlainEvaluator
    with pytest.raises(AssertionError, match="pytorch_lightning"):
        lit.evaluator()


_TRACE = ("trace_copy", "trace_symbol", "trace_args", "trace_kwargs")


def _read_nothing(instance: Any) -> Any:
    return instance.__dict__["_nni_symbol"]


def test_what_is_not_traced_is_refused(pl: Any, lit: Lightning) -> None:
    with pytest.raises(ConfigError, match=r"make the trainer with nni.trace"):
        LightningEvaluator(
            pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu"), nni.trace(lit.data)()
        )
    trainer = nni.trace(pl.Trainer)(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ConfigError, match=r"make the data_module with nni.trace"):
        LightningEvaluator(trainer, lit.data())
    # NNI leaves properties on a class that it has traced an object of; that makes other objects no more traced.
    marked = type("Marked", (lit.data,), {name: property(_read_nothing) for name in _TRACE})
    with pytest.raises(ConfigError, match=r"make the data_module with nni.trace"):
        LightningEvaluator(trainer, marked())
    with pytest.raises(ConfigError, match=r"trainer must be a Lightning Trainer, got a int"):
        LightningEvaluator(3, lit.data())


def test_two_schedulers_of_one_optimizer_are_refused(lit: Lightning) -> None:
    def returns(module: nn.Module) -> Any:
        optimizer = adamw(module)
        schedulers = [nni.trace(lr_scheduler.LambdaLR)(optimizer, [lambda step: 0.5]) for _ in range(2)]
        return [optimizer], [{"scheduler": scheduler} for scheduler in schedulers]

    module = lit.module(returns)
    with pytest.raises(ConfigError, match="one scheduler an optimizer, please"):
        record_optimizers(lit.evaluator(), module)
    assert "configure_optimizers" not in vars(module)


def test_a_configure_optimizers_of_the_object_is_put_back(lit: Lightning) -> None:
    module = lit.module(adamw)
    own = module.configure_optimizers = lambda: adamw(module)
    record_optimizers(lit.evaluator(), module)
    assert module.configure_optimizers is own
