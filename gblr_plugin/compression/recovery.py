"""Distils a compressed network from the dense one: both see the same batches, and the small one learns the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.batches import Calibration
from ..calibration.inputs import fitting_mask
from ..errors import ConfigError
from ..families.layers import FamilyLayer
from ..layers.dense import layer_for, replace_modules
from ..tensor.gblr_tensor import GBLRTensor

__all__ = ["distillation_loss", "output_loss", "recover_from", "trainable_layers"]


def trainable_layers(model: nn.Module, names: Iterable[str], align: int) -> None:
    """Let the factors of converted layers train again, in place.

    Args:
        model: Holds them.
        names: Full names of compressed layers.
        align: Tile to which intervals snap.
    """
    modules = dict(model.named_modules())
    replacements: dict[int, nn.Module] = {}
    for module in (modules[name] for name in names):
        weight: Any = module.weight
        if isinstance(module, FamilyLayer):
            for factor in module.factors().values():
                factor.requires_grad_(True)
        elif isinstance(weight, GBLRTensor):
            layer = layer_for(module, weight.to_structured(), align)
            layer.use_low_rank_form()
            layer.freeze_structure()
            replacements[id(module)] = layer
        else:  # stored dense, since its structure would not have been cheaper
            weight.requires_grad_(True)
    replace_modules(model, replacements)


def distillation_loss(student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
    """How far the outputs of two networks are from each other, padding left out.

    Where they return ``logits``: the Kullback-Leibler divergence of the student's distribution from the teacher's.
    Otherwise the mean squared error of the hidden states over the teacher's mean square, plus one minus their cosine.

    Args:
        student: What the network returns: a tensor, a table with ``logits`` or ``last_hidden_state``, or a tuple that
            begins with a tensor.
        teacher: What the dense network returns.
        mask: Non-zero for positions that count, or ``None``.

    Raises:
        ConfigError: If there is no tensor to compare.
    """
    logits = _entry(teacher, "logits")
    if logits is not None:
        found = _entry(student, "logits")
        assert found is not None
        rows, want = _rows(found, mask), _rows(logits, mask)
        return F.kl_div(rows.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean")
    rows, want = (_rows(_states(output), mask) for output in (student, teacher))
    error = (rows - want).square().mean() / want.square().mean().clamp(min=1e-12)
    return error + (1 - F.cosine_similarity(rows, want, dim=-1)).mean()


def _entry(output: Any, name: str) -> Tensor | None:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _states(output: Any) -> Tensor:
    found = _entry(output, "last_hidden_state")
    found = output[0] if found is None and isinstance(output, (tuple, list)) and output else found
    found = output if found is None else found
    if not isinstance(found, Tensor):
        raise ConfigError(
            "compress: recover: the network must return a tensor, a tuple that begins with one, logits or "
            f"last_hidden_state, got {type(output).__name__}"
        )
    return found


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    fitting = fitting_mask(mask, values)
    return (values.flatten(0, -2) if fitting is None else values[fitting != 0]).float()


def output_loss(calibration: Calibration, model: nn.Module, batch: Any) -> Tensor:
    """A loss without labels whose curvature says how much each output counts, for the allocation of budgets.

    It is the loss of a prediction: cross-entropy where the model returns ``logits``, otherwise squared error of the
    hidden states. Its targets are drawn where it is used, see ``calibration/fisher.py``.
    """
    output, mask = calibration.forward(model, batch), calibration.valid(batch)
    logits = _entry(output, "logits")
    if logits is not None:
        rows = _rows(logits, mask)
        return F.cross_entropy(rows, rows.argmax(-1))
    rows = _rows(_states(output), mask)
    return F.mse_loss(rows, rows.detach())


def recover_from(
    model: nn.Module, dense: nn.Module, calibration: Calibration, *, steps: int, lr: float, seed: int
) -> None:
    """Train all parameters of a network that have gradients, by AdamW, to return what the dense network returns.

    Args:
        model: With trainable structured layers; changed in place, in evaluation mode, so that nothing is dropped out.
        dense: The teacher.
        calibration: Inputs, and how the models take them; no labels are needed.
        steps: Number of steps, each on one batch.
        lr: Largest learning rate: it rises over the first steps and falls along a cosine.
        seed: Seed of the order of the batches.
    """
    from ..lightning.distillation import distil  # Lightning is needed for this alone

    def loss(batch: Any) -> Tensor:
        with torch.no_grad():
            teacher = calibration.forward(dense, batch)
        return distillation_loss(calibration.forward(model, batch), teacher, calibration.valid(batch))

    dense.eval()
    distil(model.eval(), loss, calibration.batches, steps=steps, lr=lr, seed=seed)
