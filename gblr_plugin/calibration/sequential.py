"""Fits the layers of a model in order, each over the inputs that the compressed layers before it produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers.dense import check_structurable, stored_weight, weight_matrix
from ..matrix.metric import Metric
from ..utils.progress import track
from ..utils.running import evaluating
from .batches import Calibration
from .inputs import fitting_mask, input_rows, layer_inputs, shared_inputs
from .layer_moments import layer_moments
from .moments import Moments, corrected_target, output_shift

__all__ = ["fit_layers"]


class _Dense(Protocol):
    """Whatever approximates a weight."""

    def to_dense(self) -> Tensor:
        """The (m, n) matrix."""


M = TypeVar("M", bound=_Dense)


class _StandIns:
    """Dense weights that stand in for the layers fitted so far, without touching the model's parameters."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, Tensor, Tensor | None]] = []

    def add(self, module: nn.Module, estimate: Tensor, shift: Tensor | None) -> None:
        """Let this (m, n) approximation stand in for a layer, and add the (m,) shift to the layer's outputs."""
        weight: Any = module.weight
        shift = None if shift is None else shift.to(weight)
        if shift is not None and isinstance(module, nn.Conv1d | nn.Conv2d):
            shift = shift.reshape(-1, *[1] * len(module.kernel_size))
        self._done.append((module, stored_weight(module, estimate), shift))

    def __len__(self) -> int:
        return len(self._done)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the model runs with them."""
        kept, handles = [], []
        try:
            for module, stand_in, shift in self._done:
                weight: Any = module.weight
                kept.append((weight, weight.data))
                weight.data = stand_in
                if shift is not None:
                    handles.append(module.register_forward_hook(lambda _m, _x, y, by=shift: y + by))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight, data in kept:
                weight.data = data


@torch.no_grad()
def fit_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    fit: Callable[[str, Tensor, Metric], M],
) -> dict[str, tuple[M, Tensor | None]]:
    """Approximate the layers of a model by whatever ``fit`` makes, each in the metric of its output.

    Moments leave padding out; where a layer has a bias they are centred and the bias is corrected. Each layer is fitted
    against the inputs that its compressed predecessors produce, with the corrected target (see
    ``gblr_plugin.calibration.moments``). Layers that share an input share its moments. Costs two passes, each up to
    the layer, per distinct input and batch; one pass in all where the calibration is not sequential.

    Args:
        model: In any training mode; unchanged on return.
        layers: Modules of the model by name: Linear, Conv1d, Conv2d or Hugging Face ``Conv1D``.
        calibration: The batches.
        fit: ``fit(name, target, metric)`` approximates an (m, n) float64 matrix in a metric of its inputs.

    Returns:
        By name, in order of first execution: the approximation, and the (m,) corrected bias in the weight's dtype,
        ``None`` for layers without a bias.

    Raises:
        ConfigError: If a layer cannot be structured, is never run, or cannot be fitted; the message names the layer.
    """
    for name, module in layers.items():
        check_structurable(module, name)
    results: dict[str, tuple[M, Tensor | None]] = {}
    done = _StandIns()
    slopes = layer_moments(model, layers, calibration, gradients=True)[1] if calibration.loss else {}
    groups, once = shared_inputs(model, layers, lambda: calibration.forward(model, calibration.batches[0]))
    names = iter(track([name for group in groups for name in group], "decomposing"))
    with evaluating(model):
        for stage in [[group] for group in groups] if calibration.sequential else [groups]:
            moments = _stage_moments(model, layers, stage, calibration, done, once)
            for group in stage:
                held = moments[group[0]]
                input_metric = cache(partial(_input_metric, held, calibration.damping))
                for name in group:
                    next(names)
                    module = layers[name]
                    try:
                        metric = input_metric(module.bias is not None)
                        target, metric = _task(module, held, metric, calibration, slopes.get(name))
                        matrix = fit(name, target, metric)
                    except ConfigError as error:
                        raise ConfigError(f"layer {name!r}: {error}") from error
                    bias: Any = module.bias
                    estimate = matrix.to_dense()
                    shift = None if bias is None else output_shift(weight_matrix(module), estimate, *held.mean)
                    results[name] = matrix, None if shift is None else (bias.double() + shift).to(bias.dtype)
                    if calibration.sequential:
                        done.add(module, estimate, shift)
        next(names, None)  # the progress line is taken away
    return results


def _input_metric(held: Moments, damping: float, centred: bool) -> Metric:
    """The metric of a layer's inputs; the Frobenius norm if the inputs never change."""
    square = held.second(centred=centred)[1]
    return Metric.from_moment(square, damping) if float(square.diagonal().sum()) > 0 else Metric()


def _task(
    module: nn.Module, held: Moments, metric: Metric, calibration: Calibration, slope: Tensor | None
) -> tuple[Tensor, Metric]:
    """The (m, n) float64 matrix that a layer's approximation is fitted to, and the metric of the fit.

    Args:
        module: The layer.
        held: Moments of its inputs.
        metric: The metric of its inputs.
        calibration: How layers are fitted.
        slope: (m, m) moment of the loss gradients at its output, or ``None``.
    """
    target = weight_matrix(module).double()
    if calibration.sequential and metric.root is not None:
        target = corrected_target(target, held.second(centred=module.bias is not None)[0], metric)
    return target, metric if slope is None else metric.weighted(slope, calibration.damping)


def _stage_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stage: Sequence[Sequence[str]],
    calibration: Calibration,
    done: _StandIns,
    once: set[str],
) -> dict[str, Moments]:
    """Moments of the original and the present inputs of each group's first layer, by the name of that layer."""
    firsts = {group[0]: layers[group[0]] for group in stage}
    stop = set(firsts) <= once
    moments: dict[str, Moments] = {}
    for batch in calibration.batches:
        run = partial(calibration.forward, model, batch)
        original = present = layer_inputs(model, firsts, run, stop=stop)
        if len(done):
            with done.active():
                present = layer_inputs(model, firsts, run, stop=stop)
        valid = calibration.valid(batch)
        for name, module in firsts.items():
            for x0, x1 in zip(original[name], present[name], strict=True):
                rows = input_rows(module, x0)
                held = moments.setdefault(name, Moments(rows.shape[-1], rows.device))
                held.add(rows, None if x1 is x0 else input_rows(module, x1), fitting_mask(valid, rows))
    return moments
