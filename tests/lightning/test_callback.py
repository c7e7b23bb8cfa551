from __future__ import annotations

import copy
import csv
import logging
import pickle
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import gblr_plugin
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRLayer, GBLRLinear, StructuredLayer
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.learning.optimizers import STRUCTURE_KEY
from gblr_plugin.lightning import GBLRCallback
from gblr_plugin.surgery.conversion import prepare

QUIET = {"picture_every_n_epochs": 0}


def driver(**options):
    return GBLRCallback(**({"budget": 0.4, "warmup": 3, "cooldown": 14} | QUIET | options))


def layers_of(module):
    return {name: part for name, part in module.named_modules() if isinstance(part, GBLRLayer)}


@pytest.fixture
def steps(monkeypatch):
    """Counts the proximal steps that learners really take."""
    taken = []
    original = StructureLearner.after_step

    def counted(self, optimizer):
        taken.append(optimizer)
        original(self, optimizer)

    monkeypatch.setattr(StructureLearner, "after_step", counted)
    return taken


@pytest.mark.usefixtures("plans")
def test_a_plain_trainer_learns_a_structure_within_the_budget(make_module, make_trainer):
    module, callback = make_module(), driver()
    make_trainer([callback]).fit(module)
    assert len(layers_of(module)) == 3
    assert callback.learner.frozen
    assert 0.39 < callback.learner.relative_flops <= 0.4
    x = torch.randn(5, 16)
    before = module(x)
    gblr_plugin.convert(module)
    assert not layers_of(module)
    torch.testing.assert_close(module(x), before)


def test_structure_has_a_group_of_its_own_that_follows_the_scheduler(make_module, make_trainer):
    class Watch(pl.Callback):
        seen: list = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append([dict(group, params=len(group["params"])) for group in trainer.optimizers[0].param_groups])

    watch = Watch()
    make_trainer([driver(), watch], max_steps=3).fit(make_module(schedule="onecycle"))
    rest, own = watch.seen[-1]
    assert (rest["params"], own["params"]) == (9, 6)
    assert own[STRUCTURE_KEY]
    assert own["weight_decay"] == 0
    assert own["lr"] == rest["lr"]
    assert own["lr"] != watch.seen[0][1]["lr"]


def test_structure_lr_is_the_groups_own(make_module, make_trainer):
    callback = driver(structure_lr=0.125)
    trainer = make_trainer([callback], max_steps=2)
    trainer.fit(make_module())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.125]


@pytest.mark.parametrize(
    ("module_options", "trainer_options", "expected"),
    [
        ({}, {"max_steps": 5}, 5),
        ({}, {"max_steps": 4, "accumulate_grad_batches": 3}, 4),
        ({"manual": True}, {"max_steps": 5}, 5),
        ({"manual": True, "two_optimizers": True}, {"max_epochs": 1, "max_steps": -1}, 12),  # 6 batches, 2 optimizers
    ],
    ids=["plain", "accumulation", "manual", "two optimizers"],
)
def test_one_proximal_step_per_optimizer_step(
    make_module, make_trainer, steps, module_options, trainer_options, expected
):
    callback = driver()
    trainer = make_trainer([callback], **trainer_options)
    trainer.fit(make_module(**module_options))
    assert len(steps) == expected
    assert callback.learner.step_count == expected // len(trainer.optimizers)


@pytest.mark.parametrize("initialiser", ["dense", "gblr", "svd"])
def test_mixed_precision_accumulation_and_clipping_end_within_the_budget(make_module, make_trainer, initialiser):
    """24 epochs of 6 batches, 4 of which make a step: 2 steps an epoch."""
    callback = driver(initialiser=initialiser, layers=["net.0", "net.2"], warmup=0.05, cooldown=0.6)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
    module = make_module()
    make_trainer([callback], max_steps=-1, max_epochs=24, **options).fit(module)
    learner = callback.learner
    assert learner.step_count == 48
    assert learner.frozen
    assert 0.3 < learner.relative_flops <= 0.4
    for layer in layers_of(module).values():
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def test_steps_that_a_grad_scaler_skips_do_not_count(make_module, make_trainer, steps):
    class Overflowing(make_module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx in (1, 2) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = make_trainer([driver()], plugins=[precision], max_steps=-1, max_epochs=1)
    trainer.fit(Overflowing())
    assert len(steps) == 4  # of 6


def test_each_optimizer_shrinks_its_own_layers_of_a_group(make_module, make_trainer):
    module = make_module(manual=True, two_optimizers=True)
    callback = driver(budget=0.25, structure_lr=0.01, initialiser="svd")
    moved = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for optimizer, own, other in zip(trainer.optimizers, "02", "20", strict=True):
                self.watch(optimizer, pl_module.net[int(own)], pl_module.net[int(other)])

        def watch(self, optimizer, layer, other):
            step = optimizer.step

            def watched(*args, **kwargs):
                before, held = layer.widths.detach().clone(), other.widths.detach().clone()
                result = step(*args, **kwargs)
                if not callback.learner.frozen:
                    moved.append((not torch.equal(before, layer.widths), not torch.equal(held, other.widths)))
                return result

            optimizer.step = watched

    make_trainer([callback, Watch()], max_steps=40).fit(module)  # Lightning counts the steps of both
    assert set(moved) == {(True, False)}
    assert callback.learner.frozen
    assert 0.24 <= callback.learner.relative_flops <= 0.25


def test_the_optimizer_is_left_as_it_was(make_module, make_trainer):
    trainer = make_trainer([driver()], max_steps=2)
    trainer.fit(make_module())
    assert "step" not in trainer.optimizers[0].__dict__


def test_an_exception_detaches(make_module, make_trainer):
    class Failing(make_module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    callback = driver()
    trainer = make_trainer([callback])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Failing())
    assert callback.learner.step_count == 2
    assert "step" not in trainer.optimizers[0].__dict__


def parameters_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("stop", [5, 12, 17], ids=["early", "before the freeze", "after the freeze"])
@pytest.mark.parametrize("schedule", [None, "onecycle", "lambda", "sequential"])
def test_stop_and_resume_gives_the_same_parameters(make_module, make_trainer, tmp_path, stop, schedule):
    straight = make_module(schedule, by_step=True)
    make_trainer([driver()], max_steps=24).fit(straight)

    trainer = make_trainer([driver()], max_steps=stop)
    trainer.fit(make_module(schedule, by_step=True))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback = make_module(schedule, by_step=True), driver()
    nn.init.zeros_(resumed.net[0].weight)  # nothing of the fresh model may survive
    make_trainer([callback], max_steps=24).fit(resumed, ckpt_path=tmp_path / "stop.ckpt")
    assert callback.learner.step_count == 24
    assert_identical(parameters_of(resumed), parameters_of(straight))


@pytest.mark.parametrize("stop", [12, 17], ids=["before the freeze", "after the freeze"])
def test_compaction_is_resumed(make_module, make_trainer, tmp_path, stop):
    plain, straight = make_module(by_step=True), make_module(by_step=True)
    make_trainer([driver(budget=0.1, initialiser="svd")], max_steps=24).fit(plain)
    make_trainer([driver(budget=0.1, initialiser="svd", compact=True)], max_steps=24).fit(straight)
    before, after = layers_of(plain), layers_of(straight)
    assert sum(layer.U.shape[0] for layer in after.values()) < sum(layer.U.shape[0] for layer in before.values())
    x = torch.randn(5, 16)
    torch.testing.assert_close(straight(x), plain(x))

    trainer = make_trainer([driver(budget=0.1, initialiser="svd", compact=True)], max_steps=stop)
    trainer.fit(make_module(by_step=True))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback = make_module(by_step=True), driver(budget=0.1, initialiser="svd", compact=True)
    trainer = make_trainer([callback], max_steps=24)
    trainer.fit(resumed, ckpt_path=tmp_path / "stop.ckpt")
    assert_identical(parameters_of(resumed), parameters_of(straight))
    state = trainer.optimizers[0].state
    for layer in layers_of(resumed).values():
        assert state[layer.U]["exp_avg"].shape == layer.U.shape


def test_fractions_keep_the_meaning_they_had_when_training_began(make_module, make_trainer, tmp_path):
    def make(**options):
        return driver(warmup=0.1, cooldown=0.75, **options)

    straight, first = make_module(), make()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=12, save_top_k=-1, filename="{step}")
    make_trainer([first, saver], max_steps=24, enable_checkpointing=True).fit(straight)
    resumed, callback = make_module(), make()
    make_trainer([callback], max_steps=30).fit(resumed, ckpt_path=tmp_path / "step=12.ckpt")
    assert callback.learner.schedule == first.learner.schedule
    short, last = make_module(), make()
    make_trainer([last], max_steps=24).fit(short, ckpt_path=tmp_path / "step=12.ckpt")
    assert_identical(parameters_of(short), parameters_of(straight))
    assert first.history["relative_flops"][3:] == [
        point
        for point in last.history["relative_flops"][3:]
        if point[0] not in (12, 13)  # logged when it went on
    ]


@pytest.mark.parametrize("components", [None, 5])
def test_a_dense_model_evaluates_a_structured_checkpoint(make_module, make_trainer, tmp_path, components):
    trained = make_module()
    trainer = make_trainer([driver(num_components=components)])
    trainer.fit(trained)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.test(trained, verbose=False)
    fresh = make_module()
    got = make_trainer([driver()]).test(fresh, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert got == expected
    assert_identical(parameters_of(fresh), parameters_of(trained))


def test_resume_fits_component_counts_that_depend_on_the_weight(make_module, make_trainer, tmp_path):
    trainer = make_trainer([driver(num_components=7)], max_steps=6)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback = make_module(), driver(num_components=9)
    make_trainer([callback], max_steps=24).fit(resumed, ckpt_path=tmp_path / "stop.ckpt")
    assert callback.learner.layers["net.0"].U.shape[0] == 7
    assert 0.39 < callback.learner.relative_flops <= 0.4


def test_layers_are_chosen_by_name_pattern_and_type(make_module, make_trainer):
    for options, names in (
        ({"layers": ["net.0"]}, {"net.0"}),
        ({"layers": ["net.[02]"]}, {"net.0", "net.2"}),
        ({"layers": [nn.Linear], "exclude": ["net.4"]}, {"net.0", "net.2"}),
    ):
        module = make_module()
        make_trainer([driver(**options)], max_steps=1).fit(module)
        assert layers_of(module).keys() == names
    with pytest.raises(ConfigError, match=r"net\.7"):
        make_trainer([driver(layers=["net.7"])]).fit(make_module())


def test_row_splits_may_differ_by_layer(make_module, make_trainer):
    module = make_module()
    make_trainer([driver(row_splits={"net.[02]": 3, "net.2": 2}, align=2)], max_steps=1).fit(module)
    assert {name: layer.row_splits for name, layer in layers_of(module).items()} == {"net.0": 3, "net.2": 3, "net.4": 1}
    assert all(layer.align == (2, 2) for layer in layers_of(module).values())


def test_row_splits_of_no_layer_are_an_error(make_module, make_trainer):
    with pytest.raises(ConfigError, match=r"'net\.qkv' matches no chosen layer"):
        make_trainer([driver(row_splits={"net.qkv": 3})]).fit(make_module())


def test_warmup_steps_past_a_cooldown_fraction_are_an_error(make_module, make_trainer):
    with pytest.raises(ConfigError, match="warmup_step < cooldown_begin_step"):
        make_trainer([driver(warmup=15, cooldown=0.5)]).fit(make_module())


def test_fast_dev_run(make_module, make_trainer):
    callback = GBLRCallback(0.4, picture_every_n_epochs=1)
    make_trainer([callback], fast_dev_run=True).fit(make_module())
    assert callback.learner.step_count == 1


def test_each_layer_meets_the_budget_of_its_own_without_a_group(make_module, make_trainer):
    module = make_module()
    make_trainer([driver(group=False)]).fit(module)
    assert all(0.3 < layer.relative_flops <= 0.4 for layer in layers_of(module).values())


def test_a_fixed_threshold_shrinks_without_a_budget(make_module, make_trainer):
    module, callback = make_module(), driver(budget=None, threshold=2.0)
    make_trainer([callback]).fit(module)
    assert callback.learner.frozen
    assert callback.history["lambda"][2][1] == pytest.approx(2.0)
    assert callback.learner.relative_flops < 1.5


def test_other_initialisers_start_at_the_budget(make_module, make_trainer):
    callback = driver(initialiser="trapezoid", layers=["net.0", "net.2"])
    make_trainer([callback], max_steps=1).fit(make_module())
    assert callback.history["relative_flops"][0][1] <= 0.4


def test_watching_changes_nothing(make_module, make_trainer, steps):
    def fit(callbacks):
        module = make_module()
        prepare(module, ["net.2"])
        trainer = make_trainer(callbacks, max_steps=8)
        trainer.fit(module)
        return parameters_of(module), trainer

    callback = GBLRCallback()
    watched, trainer = fit([callback])
    unwatched, _ = fit([])
    assert_identical(watched, unwatched)
    assert not steps
    assert len(trainer.optimizers[0].param_groups) == 1
    assert [step for step, _ in callback.history["relative_flops"]] == [0, 1, 5, 8]


def test_watching_needs_something_to_watch(make_module, make_trainer):
    with pytest.raises(ConfigError, match="no structured layers to watch"):
        make_trainer([GBLRCallback()]).fit(make_module())


def test_a_watched_learner_shows_its_lambda_and_is_left_alone(make_module, make_trainer, tmp_path):
    module, watching = make_module(), GBLRCallback(**QUIET)
    layers = prepare(module, ["net.2"])
    goal = gblr_plugin.LayerGoal(threshold=0.5)
    learner = StructureLearner(layers, {"net.2": goal}, gblr_plugin.Schedule(2, 16))
    watching.watch(learner)

    class Host(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            learner.attach_all(trainer.optimizers)

    trainer = make_trainer([Host(), watching], max_steps=10)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    assert watching.history["lambda"][-1] == (10, pytest.approx(0.5))
    assert len(learner._hooks) == 1
    again = GBLRCallback(**QUIET)
    make_trainer([again], max_steps=12).fit(module, ckpt_path=tmp_path / "stop.ckpt")
    assert again.history["relative_flops"][:2] == watching.history["relative_flops"][:2]
    with pytest.raises(ConfigError, match="cannot watch too"):
        driver().watch(learner)


def test_prepared_layers_are_driven_as_they_are(make_module, make_trainer):
    module = make_module()
    prepared = prepare(module, ["net.2"])
    callback = driver()
    make_trainer([callback]).fit(module)
    assert callback.learner.layers == prepared
    assert type(module.net[0]) is nn.Linear
    assert prepared["net.2"].relative_flops <= 0.4


def test_layers_that_nni_drives_are_not_driven_twice(make_module, make_trainer):
    module = make_module()
    prepare(module, ["net.2"])["net.2"]._nni_wrapper = nn.Identity()
    with pytest.raises(ConfigError, match="NNI pruner drives it already"):
        make_trainer([driver()]).fit(module)
    make_trainer([GBLRCallback()], max_steps=1).fit(module)


def test_a_model_built_in_configure_model(make_module, make_trainer):
    class Late(make_module):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = make_module().net

    module, callback = Late(), driver()
    make_trainer([callback]).fit(module)
    assert callback.learner.frozen
    assert isinstance(module.net[0], GBLRLinear)


def test_a_model_rebuilt_after_the_swap_is_an_error(make_module, make_trainer):
    class Rebuilt(make_module):
        def setup(self, stage):
            self.net = make_module().net

    with pytest.raises(ConfigError, match="replaced after the callback structured it"):
        make_trainer([driver()]).fit(Rebuilt())


def test_a_sharded_strategy_is_an_error(make_module, make_trainer):
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ConfigError, match="FSDPStrategy shards"):
        make_trainer([driver()], strategy=FSDPStrategy("cpu")).fit(make_module())


def test_widths_that_are_in_no_optimizer_are_an_error(make_module, make_trainer):
    class Partial(make_module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net[0].parameters())

    with pytest.raises(ConfigError, match=r"'net.2': its widths are in no optimizer"):
        make_trainer([driver()]).fit(Partial())


def test_training_that_ends_early_says_so_or_freezes(make_module, make_trainer, caplog):
    callback = driver()
    with caplog.at_level(logging.WARNING, "gblr_plugin"):
        make_trainer([callback], max_steps=8).fit(make_module())
    assert "before the cool-down at step 14" in caplog.text
    assert not callback.learner.frozen
    callback.learner.freeze()
    assert callback.learner.relative_flops <= 0.4 or callback.learner.progress == 1.0
    ending = driver(freeze_at_end=True)
    make_trainer([ending], max_steps=8).fit(make_module())
    assert ending.learner.frozen
    assert ending.learner.relative_flops <= 0.4


def test_a_second_fit_goes_on(make_module, make_trainer):
    module, callback = make_module(), driver()
    make_trainer([callback], max_steps=8).fit(module)
    assert not callback.learner.frozen
    make_trainer([callback], max_steps=8).fit(module)
    assert callback.learner.step_count == 16
    assert callback.learner.frozen


def test_unknown_number_of_steps_is_an_error(make_module, make_trainer):
    with pytest.raises(ConfigError, match="give warmup and cooldown as integers"):
        make_trainer([GBLRCallback(0.5)], max_steps=-1, max_epochs=-1).fit(make_module())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget must be relative FLOPs"),
        ({"budget": 0.5, "threshold": 0.1}, "not both"),
        ({"warmup": 1.5}, "fraction must lie"),
        ({"warmup": -1}, "must be a step"),
        ({"warmup": 10, "cooldown": 5}, "less than cooldown"),
        ({"layers": "net.0"}, "layers is a list"),
        ({"budget": None, "threshold": 1.0, "initialiser": "trapezoid"}, "initial_budget"),
        ({"initialiser": "blast"}, "initialiser must be one of dense, gblr, .*, got 'blast'"),
        ({"structure_lr": 0.0}, "structure_lr must be positive"),
        ({"log_every_n_steps": 0}, "log_every_n_steps"),
        ({"picture_size": 4}, "picture_size"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        driver(**options)


def test_the_callback_can_be_copied_and_pickled(make_module, make_trainer):
    callback = driver()
    assert pickle.loads(pickle.dumps(callback)).state_dict() == callback.state_dict()
    make_trainer([callback]).fit(make_module())
    assert copy.deepcopy(callback).learner.step_count == 20


# -- several callbacks, several rounds ---------------------------------------------------------------------------------


def pair(**options):
    return [
        driver(budget=0.5, layers=["net.0"], cooldown=10, align=2, **options),
        driver(budget=0.2, exclude=["net.0"], **options),
    ]


@pytest.mark.parametrize("stop", [5, 11, 17])
def test_two_callbacks_over_different_layers_resume_to_the_bit(make_module, make_trainer, tmp_path, stop):
    class Shuffled(make_module):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(super().train_dataloader().dataset, batch_size=8, shuffle=True)

    def fresh():
        torch.manual_seed(3)
        return Shuffled()

    straight, callbacks = fresh(), pair()
    make_trainer(callbacks, max_steps=24).fit(straight)
    first, second = (callback.learner for callback in callbacks)
    assert (first.layers.keys(), second.layers.keys()) == ({"net.0"}, {"net.2", "net.4"})
    assert 0.48 < first.relative_flops <= 0.5
    assert second.relative_flops <= 0.2
    assert callbacks[0].history["relative_flops"] != callbacks[1].history["relative_flops"]

    trainer = make_trainer(pair(), max_steps=stop)
    trainer.fit(fresh())
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callbacks = fresh(), pair()
    torch.manual_seed(99)
    make_trainer(callbacks, max_steps=24).fit(resumed, ckpt_path=tmp_path / "stop.ckpt")
    assert [callback.learner.step_count for callback in callbacks] == [24, 24]
    assert_identical(parameters_of(resumed), parameters_of(straight))


def test_a_dense_model_evaluates_a_checkpoint_of_two_callbacks(make_module, make_trainer, tmp_path):
    module = make_module()
    trainer = make_trainer(pair())
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    evaluated = make_module()
    make_trainer(pair()).test(evaluated, ckpt_path=tmp_path / "both.ckpt", verbose=False)
    assert {name: layer.align for name, layer in layers_of(evaluated).items()} == {
        "net.0": (2, 2),
        "net.2": (1, 1),
        "net.4": (1, 1),
    }
    x = torch.randn(5, 16)
    assert torch.equal(evaluated(x), module(x))


@pytest.mark.parametrize("key", ["GBLRCallback", "GBLRCallback{'layers': ['net.0', 'net.2'], 'exclude': []}"])
def test_checkpoints_under_an_older_key_are_resumed(make_module, make_trainer, tmp_path, key):
    trainer = make_trainer([driver(layers=["net.[02]"])], max_steps=8)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=False)
    (state,) = checkpoint["callbacks"].values()
    torch.save(checkpoint | {"callbacks": {key: state}}, tmp_path / "older.ckpt")
    callback = driver(layers=["net.[02]"])
    make_trainer([callback], max_steps=10).fit(make_module(), ckpt_path=tmp_path / "older.ckpt")
    assert callback.learner.step_count == 10


def test_two_callbacks_log_beside_each_other(make_module, make_trainer, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(pair(), logger=logger)
    trainer.fit(make_module())
    rows = csv.DictReader(Path(logger.experiment.metrics_file_path).read_text().splitlines())
    last = {name: float(value) for row in rows for name, value in row.items() if value}
    assert 0.48 < last["gblr/relative_flops"] <= 0.5
    assert last["gblr_2/relative_flops"] <= 0.2
    assert {"gblr_layers/net.0/relative_flops", "gblr_layers/net.4/relative_flops"} <= last.keys()
    assert {"gblr/relative_flops", "gblr_2/relative_flops"} <= trainer.callback_metrics.keys()


def test_two_callbacks_over_one_layer_are_an_error(make_module, make_trainer):
    with pytest.raises(ConfigError, match=r"layer 'net.0': another structure learner drives it"):
        make_trainer([driver(layers=["net.0"]), driver()]).fit(make_module())


@pytest.mark.parametrize("budget", [0.2, 0.9])
def test_a_second_round_goes_on_from_the_frozen_structure(make_module, make_trainer, budget):
    module = make_module()
    make_trainer([driver()]).fit(module)
    callback = driver(budget=budget)
    make_trainer([callback]).fit(module)
    assert callback.learner.frozen
    assert callback.history["relative_flops"][0][1] <= 0.4
    assert budget - 0.1 < callback.learner.relative_flops <= budget or budget == 0.9


def test_lbfgs_is_an_error(make_module, make_trainer):
    class Module(make_module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigError, match="optimizer: LBFGS has no parameter groups; structure parameters need"):
        make_trainer([driver()]).fit(Module())


# -- other families ----------------------------------------------------------------------------------------------------

FAMILIES = {
    "block_low_rank": {},
    "monarch": {"blocks": 4},
    "block_sparse": {},  # where its blocks lie is no parameter
    "gblr": {},
}


def of_family(family="monarch", **options):
    settings = {"budget": 0.5, "family": family, "family_options": FAMILIES.get(family, {}), "layers": ["net.[02]"]}
    return GBLRCallback(**(settings | QUIET | options))


def structured_of(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, StructuredLayer)}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_family_train_within_the_budget(make_module, make_trainer, tmp_path, family):
    module, callback = make_module(), of_family(family, picture_every_n_epochs=1)
    start = make_module()
    prepare(start, ["net.[02]"], family=family, budget=0.5, **FAMILIES[family])
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = make_trainer([callback], logger=logger)
    trainer.fit(module)
    layers = structured_of(module)
    assert layers.keys() == {"net.0", "net.2"}
    assert {layer.structure_name for layer in layers.values()} == {family}
    assert all(layer.relative_flops <= 0.5 for layer in layers.values())
    assert parameters_of(module).keys() == parameters_of(start).keys()
    assert not torch.equal(layers["net.0"].to_dense(), structured_of(start)["net.0"].to_dense())
    assert callback.learner is None
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [1]
    assert 0 < callback.history["relative_flops"][-1][1] <= 0.5
    assert callback.history["frozen"][0] == (0, 1.0)
    assert ("live_components" in callback.history) == (family == "gblr")
    assert float(trainer.callback_metrics["gblr/relative_flops"]) <= 0.5
    x = torch.randn(5, 16)
    before = module(x)
    gblr_plugin.convert(module)
    assert not any(parameter.requires_grad for parameter in module.net[0].parameters() if parameter.dim() > 1)
    torch.testing.assert_close(module(x), before)


def test_factors_of_a_family_move_at_their_pace(make_module, make_trainer):
    moved = {}
    for pace in (1.0, 4.0):
        module = make_module()
        start = copy.deepcopy(module)
        prepare(start, ["net.[02]"], family="monarch", budget=0.5, **FAMILIES["monarch"])
        make_trainer([of_family("monarch", pace=pace)], max_steps=1).fit(module)
        before = dict(start.named_parameters())
        moved[pace] = {name: value.detach() - before[name] for name, value in module.named_parameters()}
    factors = {f"net.{place}.{name}" for place in "02" for name in module.net[int(place)].factors()}
    assert factors
    for name, step in moved[1.0].items():
        torch.testing.assert_close(moved[4.0][name], step * (4 if name in factors else 1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_family_resume_to_the_bit(make_module, make_trainer, tmp_path, family):
    straight = make_module(by_step=True)
    make_trainer([of_family(family)], max_steps=12).fit(straight)
    trainer = make_trainer([of_family(family)], max_steps=5)
    trainer.fit(make_module(by_step=True))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback = make_module(by_step=True), of_family(family, budget=0.45)
    with torch.no_grad():
        resumed.net[2].weight.copy_(torch.randn(24, 24))  # another projection, whose structure differs
    make_trainer([callback], max_steps=12).fit(resumed, ckpt_path=tmp_path / "stop.ckpt", weights_only=True)
    assert_identical(parameters_of(resumed), parameters_of(straight))
    x = torch.randn(5, 16)
    assert torch.equal(resumed(x), straight(x))
    assert [step for step, _ in callback.history["relative_flops"]] == [0, 1, 5, 6, 10, 12]

    evaluated = make_module()
    make_trainer([GBLRCallback()]).test(evaluated, ckpt_path=tmp_path / "stop.ckpt", verbose=False)
    assert structured_of(evaluated).keys() == {"net.0", "net.2"}


def test_a_checkpoint_of_weights_alone_does_not_say_the_structure(make_module, make_trainer, tmp_path):
    trainer = make_trainer([of_family()], max_steps=2)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ConfigError, match=r"layer 'net.0': the checkpoint does not say which structure of family 'mon"):
        make_trainer([of_family()]).fit(make_module(), ckpt_path=tmp_path / "weights.ckpt")


def test_a_second_fit_goes_on_with_the_layers_of_a_family(make_module, make_trainer):
    module, callback = make_module(), of_family()
    make_trainer([callback], max_steps=2).fit(module)
    layers = structured_of(module)
    make_trainer([callback], max_steps=2).fit(module)
    assert structured_of(module) == layers
    with pytest.raises(
        ConfigError, match=r"layer 'net.0': it is a monarch layer already, not one of family 'block_low"
    ):
        make_trainer([of_family("block_low_rank")]).fit(module)
    watching = GBLRCallback(**QUIET)
    make_trainer([watching], max_steps=2).fit(module)
    assert watching.history["relative_flops"][0] == (0, callback.history["relative_flops"][-1][1])


def test_a_family_beside_a_learned_structure(make_module, make_trainer, tmp_path):
    module, fixed, learned = make_module(), of_family(layers=["net.0"]), driver(layers=["net.2"])
    trainer = make_trainer([fixed, learned])
    trainer.fit(module)
    assert learned.learner.layers.keys() == {"net.2"}
    assert {name: layer.structure_name for name, layer in structured_of(module).items()} == {
        "net.0": "monarch",
        "net.2": "gblr",
    }
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    evaluated = make_module()
    make_trainer([GBLRCallback()]).test(evaluated, ckpt_path=tmp_path / "both.ckpt", verbose=False)
    x = torch.randn(5, 16)
    assert torch.equal(evaluated(x), module(x))


def test_a_family_splits_the_budget_by_its_own_rule_and_rows_by_pattern(make_module, make_trainer):
    module, alone = make_module(), make_module()
    make_trainer([of_family("alds")], max_steps=1).fit(module)
    make_trainer([of_family("alds", group=False, row_splits={"net.2": 2})], max_steps=1).fit(alone)
    costs = {name: layer.multiply_adds for name, layer in structured_of(module).items()}
    assert sum(costs.values()) <= 0.5 * (24 * 16 + 24 * 24)
    assert all(layer.relative_flops <= 0.5 for layer in structured_of(alone).values())
    expected = make_module()
    prepare(expected, ["net.[02]"], family="alds", budget=0.5)
    assert costs == {name: layer.multiply_adds for name, layer in structured_of(expected).items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initialiser": "svd"}, "family 'monarch' has a fixed structure; leave initialiser out"),
        ({"structure_lr": 0.1}, "leave structure_lr out"),
        ({"num_components": 4}, "leave num_components out"),
        ({"initial_budget": 0.5}, "leave initial_budget out"),
        ({"align": 2}, "leave align out"),
        ({"freeze_at_end": True}, "leave freeze_at_end out"),
        ({"warmup": 3}, "leave warmup and cooldown out"),
        ({"cooldown": 0.5}, "leave warmup and cooldown out"),
        ({"budget": None}, "family 'monarch' needs a budget"),
        ({"budget": None, "threshold": 0.5}, "family 'monarch' needs a budget"),
        ({"family": "monarchy"}, "family: no structure named 'monarchy'.*did you mean 'monarch'"),
        ({"family": None}, "family_options are those of a family"),
        ({"family_options": {"row_splits": 2}}, "family_options cannot have 'row_splits'"),
    ],
)
def test_arguments_that_contradict_a_family(options, message):
    with pytest.raises(ConfigError, match=message):
        GBLRCallback(**({"budget": 0.5, "family": "monarch", "family_options": {"blocks": 4}} | options))


def test_an_unknown_option_of_a_family_is_an_error(make_module, make_trainer):
    with pytest.raises(ConfigError, match=r"layer 'net.0': monarch: no option 'rank'"):
        make_trainer([of_family(family_options={"rank": 4})]).fit(make_module())


def test_by_default_layers_are_dense_until_the_cool_down(make_module, make_trainer):
    module, callback = make_module(by_step=True), GBLRCallback(budget=0.3, cooldown=12)
    make_trainer([callback], max_steps=11).fit(module)
    assert all(layer.holds_dense_weight for layer in callback.learner.layers.values())
    plain = make_module(by_step=True)
    make_trainer([], max_steps=11).fit(plain)
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)
    make_trainer([callback], max_steps=20).fit(module)
    assert callback.learner.frozen
    assert callback.learner.relative_flops <= 0.3
    frozen = [value for _, value in callback.history["relative_flops"]]
    assert frozen[0] == 1.0
    assert frozen[-1] <= 0.3
