"""Targets drawn from the model itself, so that second moments of loss gradients are the Fisher matrix.

With the targets of the training data, these gradients vanish once a network fits that data exactly, and then do not
show how errors raise the loss. With targets drawn from the network's predictions they measure the curvature of the loss
(Kunstner et al. 2019, "Limitations of the empirical Fisher approximation").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["SampledTargets"]


def _classes(scores: Tensor) -> Tensor:
    """Class indices drawn from logits or log-probabilities; classes are dimension 1, or the only one."""
    last = scores.detach().float().movedim(1 if scores.dim() > 1 else 0, -1)
    drawn = torch.multinomial(last.softmax(-1).reshape(-1, last.shape[-1]), 1)
    return drawn.reshape(last.shape[:-1])


def _cross_entropy(given: dict[str, Any]) -> dict[str, Any]:
    drawn = _classes(given["input"])
    target = given["target"]
    if not target.is_floating_point():
        drawn = torch.where(target == given.get("ignore_index", -100), target, drawn)
    return {**given, "target": drawn, **({"label_smoothing": 0.0} if "label_smoothing" in given else {})}


def _binary(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "target": torch.bernoulli(given["input"].detach().sigmoid()).to(given["target"].dtype)}


def _gaussian(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "target": given["input"].detach() + torch.randn_like(given["input"])}


_LOSSES: Mapping[Callable[..., Any], Callable[[dict[str, Any]], dict[str, Any]]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary,
    F.mse_loss: _gaussian,
}


class SampledTargets(TorchFunctionMode):
    """Within this context the losses of ``torch.nn.functional`` get targets drawn from the model's predictions.

    These losses are ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy_with_logits`` and ``mse_loss`` (a Gaussian
    of variance 1), also if modules call them. Positions of ``ignore_index`` stay ignored. Other losses do not change.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch."""
        kwargs = kwargs or {}
        drawing = _LOSSES.get(func) if inspect.isfunction(func) else None
        if drawing is None:
            return func(*args, **kwargs)
        given = dict(inspect.signature(func).bind(*args, **kwargs).arguments)
        return func(**drawing(given))
