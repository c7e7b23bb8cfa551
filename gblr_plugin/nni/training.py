"""Compress and train with any compressor of a run, so that NNI's own pruners compare fairly with ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.base.compressor import Pruner, Quantizer
from nni.compression.pruning.scheduled_pruner import ScheduledPruner
from torch import Tensor, nn

from ..errors import ConfigError
from ._compat import parameter_names
from .evaluators import train_bound

__all__ = ["check_comparable", "compress_and_train"]


def check_comparable(name: str, compressor: Any) -> None:
    """Refuse what would come out of a run as the dense network under another name.

    Raises:
        ConfigError: For a quantizer: NNI only simulates it, and unwrapping takes it off again.
    """
    if isinstance(compressor, Quantizer):
        raise ConfigError(
            f"methods: {name!r} is a quantizer, which NNI only simulates; a run compares pruners and structures"
        )


def compress_and_train(compressor: Any, epochs: int) -> None:
    """Compress, train for so many epochs, and take NNI's wrappers off.

    NNI's pruners that choose once (``level``, ``l1``, ``l2``, ``fpgm``, and ``taylor`` and ``slim`` after their own
    ``training_steps``) are fine-tuned under their masks afterwards. Masks alone make nothing cheaper: the entries they
    prune end as zeros of a dense weight, which the report counts in full and notes.

    Args:
        compressor: From :func:`gblr_plugin.nni.create_compressor`, made with an evaluator; its model is changed.
        epochs: Passes over the training set.
    """
    if isinstance(compressor, Pruner) and not isinstance(compressor, ScheduledPruner):
        model, masks = compressor.compress(None, None)
        train_bound(compressor.evaluator, model, parameter_names(compressor), max_epochs=epochs)
    else:
        model, masks = compressor.compress(None, epochs)
    compressor.unwrap_model()
    _apply(model, masks)


@torch.no_grad()
def _apply(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Zero the pruned entries of the weights and biases that are there as such; structured layers have none."""
    for layer, targets in masks.items():
        module = model.get_submodule(layer)
        for target, mask in targets.items():
            parameter = module._parameters.get(target)
            if parameter is None or mask is None:
                continue
            parameter.mul_(mask)
