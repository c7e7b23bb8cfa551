"""One compression of a network by a method of a run: the compressor, its training, and the conversion."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .. import families
from ..lightning import GBLRCallback
from ..nni import LightningEvaluator, create_compressor
from ..nni.training import compress_and_train
from ..surgery.conversion import convert
from ..surgery.reorder import reorder
from ..tasks.base import ClassifierModule
from .context import RunContext, config_list_of
from .data import data_of
from .dense import make_module, make_trainer
from .settings import Method
from .trainer import accumulated

__all__ = ["Compressed", "compress_once", "make_compressor"]

Compressed = tuple[nn.Module, dict[str, list[tuple[int, float]]]]
"""A compressed network, and its curves: relative FLOPs, sigma and others over the steps."""

_CALIBRATED = ("agp", "gblr_fixed", "linear", *families.names())  # compressors that project dense weights
_LEARNED = ("gblr", "agp", "linear")  # compressors under which a structure changes while it trains


def make_compressor(
    context: RunContext,
    method: Method,
    network: nn.Module,
    seed: int,
    *,
    calibrated: bool = True,
    label: str | None = None,
) -> tuple[Any, ClassifierModule, GBLRCallback]:
    """A method's compressor, bound to an evaluator, the module it works on, and what watches its structure.

    Arguments are those of :func:`compress_once`.
    """
    settings, training = context.settings, context.training_of(method)
    data = data_of(context.task, seed, training)
    batches = len(data.train_dataloader())
    module = make_module(context, network, training, batches)
    if settings.reorder:
        reorder(module, settings.reorder, example_input=context.task.example_input())
    if training.distillation:
        module.learn_from(copy.deepcopy(network))
    monitor = GBLRCallback(budget=None, picture_every_n_epochs=max(training.epochs // 8, 1))
    learned = method.name in _LEARNED and method.options.get("pruner", "gblr") == "gblr"
    watching = [*([monitor] if learned else []), *context.watchers]
    evaluator = LightningEvaluator(make_trainer(context, training, watching, seed, label or method.name), data)
    options = dict(method.options)
    if method.name in ("gblr", "movement"):
        steps = training.steps(batches, accumulated(settings.trainer))
        options.setdefault("warmup_step", round(method.warmup * steps))
        options.setdefault("cooldown_begin_step", max(round((1 - method.cooldown) * steps), 1))
    calibration = method.calibration or settings.calibration
    if calibrated and calibration is not None and method.options.get("pruner", method.name) in _CALIBRATED:
        options.setdefault("calibration", calibration)
    config_list = config_list_of(method, settings, context.task)
    if method.compact and method.name == "gblr":
        config_list = [{"gblr_compact": True, **entry} for entry in config_list]
    return create_compressor(method.name, module, config_list, evaluator, **options), module, monitor


def compress_once(
    context: RunContext,
    method: Method,
    network: nn.Module,
    seed: int,
    *,
    calibrated: bool = True,
    train: bool = True,
    label: str | None = None,
) -> Compressed:
    """The network, compressed by a method from one start, fine-tuned and converted.

    Args:
        context: Context of the run.
        method: The method.
        network: Trained dense network; used up.
        seed: Seed of the split.
        calibrated: Whether a one-shot start is fitted to the calibration batches, if the settings have some.
        train: Whether it is fine-tuned; for methods that are one-shot starts.
        label: Name of its TensorBoard events; default the method's.
    """
    compressor, module, monitor = make_compressor(
        context, method, network.train(), seed, calibrated=calibrated, label=label
    )
    if train:
        compress_and_train(compressor, context.training_of(method).epochs)
    return convert(module.network).eval(), monitor.history
