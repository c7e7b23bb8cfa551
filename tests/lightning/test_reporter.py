from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gblr_plugin.families import get
from gblr_plugin.families.layers import trainable
from gblr_plugin.lightning import GBLRCallback
from gblr_plugin.lightning.reporter import log_pictures, scalars
from gblr_plugin.monitoring.statistics import Statistics

TOTALS = {"relative_flops", "live_components", "mean_row_width", "mean_column_width", "lambda"}


class ImageLogger(Logger):
    """Takes pictures the way Lightning's WandbLogger does."""

    name = version = "images"

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, list] = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass

    def log_image(self, key, images, step=None):
        self.images.setdefault(key, []).append((step, *images))


class Bar(Callback):
    def on_train_batch_end(self, trainer, *args):
        self.shown = trainer.progress_bar_metrics


def fit(make_module, make_trainer, logger, **options):
    callback = GBLRCallback(0.4, warmup=3, cooldown=14, **options)
    trainer = make_trainer([callback, Bar()], logger=logger)
    trainer.fit(make_module())
    return trainer, callback


def test_tensorboard_gets_scalars_pictures_and_the_tab(make_module, make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    _, callback = fit(make_module, make_trainer, logger, picture_every_n_epochs=2, initialiser="svd")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {f"gblr/{what}" for what in TOTALS | {"sigma", "frozen"}} <= set(tags["scalars"])
    for layer in ("net.0", "net.2", "net.4"):
        assert {f"gblr_layers/{layer}/{what}" for what in TOTALS} <= set(tags["scalars"])
    curve = events.Scalars("gblr/relative_flops")
    # Every fifth step, and the start, the first step and the freeze.
    assert [point.step for point in curve] == [0, 1, 5, 10, 14, 15, 20]
    assert [point.value for point in curve] == pytest.approx([value for _, value in callback.history["relative_flops"]])
    assert [point.step for point in events.Scalars("gblr/sigma")] == [0, 1, 5, 10]  # infinite once frozen
    # The start, the end of every second epoch (6 steps each), the freeze, and the end.
    assert [image.step for image in events.Images("gblr_structure/net.2")] == [0, 12, 14, 20]
    assert any("gblr" in tag for tag in tags["tensors"])


def test_a_csv_logger_gets_scalars_only(make_module, make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(make_module, make_trainer, logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["gblr/relative_flops"]][-1]
    assert 0.39 < float(last["gblr/relative_flops"]) <= 0.4
    parts = [float(last[f"gblr_layers/net.{i}/live_components"]) for i in (0, 2, 4)]
    assert float(last["gblr/live_components"]) == sum(parts)


def test_a_logger_with_log_image_gets_pictures(make_module, make_trainer):
    logger = ImageLogger()
    fit(make_module, make_trainer, logger, picture_every_n_epochs=1, picture_every_n_steps=4, picture_size=96)
    assert logger.images.keys() == {"gblr_structure/net.0", "gblr_structure/net.2", "gblr_structure/net.4"}
    drawn = logger.images["gblr_structure/net.2"]
    assert [step for step, _ in drawn] == [0, 4, 6, 8, 12, 14, 16, 18, 20]
    assert all(picture.dtype == np.uint8 and picture.shape[0] == 96 and picture.shape[2] == 3 for _, picture in drawn)
    assert not np.array_equal(drawn[0][1], drawn[-1][1])


def test_no_pictures_when_asked_for_none(make_module, make_trainer):
    logger = ImageLogger()
    fit(make_module, make_trainer, logger, picture_every_n_epochs=0)
    assert not logger.images


def test_the_progress_bar_and_monitors_see_flops_and_sigma(make_module, make_trainer):
    trainer, callback = fit(make_module, make_trainer, False, picture_every_n_epochs=0)
    shown = trainer.callbacks[1].shown
    assert shown["rel_flops"] == pytest.approx(callback.learner.relative_flops)
    assert shown["sigma"] == math.inf
    assert not any(name.startswith("gblr/") for name in shown)
    assert trainer.callback_metrics["gblr/relative_flops"] == pytest.approx(callback.learner.relative_flops)


def test_log_interval_may_differ_from_the_trainers(make_module, make_trainer):
    _, callback = fit(make_module, make_trainer, False, log_every_n_steps=8, picture_every_n_epochs=0)
    assert [step for step, _ in callback.history["relative_flops"]] == [0, 1, 8, 14, 16, 20]


def test_scalars_leave_out_what_is_unknown():
    part = Statistics(0.5, 3, 0.25, 0.125, 100)
    values = scalars({"fc": part}, part, None, True, {})
    assert values["gblr/frozen"] == 1.0
    assert values["gblr_layers/fc/mean_row_width"] == 0.25
    assert not {"gblr/sigma", "gblr/lambda", "gblr_layers/fc/lambda"} & values.keys()


def test_layers_of_a_family_are_drawn_where_they_are_gblr_matrices():
    logger, kinds = ImageLogger(), ("block_low_rank", "monarch", "block_sparse")
    log_pictures([logger], {kind: trainable(get(kind), nn.Linear(32, 32), 0.6) for kind in kinds}, 0, max_size=64)
    assert list(logger.images) == ["gblr_structure/block_low_rank"]
