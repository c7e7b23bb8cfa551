"""Compress the layers of a model in order, each against the inputs that its compressed predecessors really produce."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decomposition.api import decompose
from ..errors import ConfigError
from ..layers.dense import check_structurable, stored_weight, weight_matrix
from ..matrix.metric import DAMPING, Metric
from ..matrix.structure import StructuredMatrix
from ..utils.progress import track
from ..utils.random_state import accelerators_of, keep_random_state
from .batches import Calibration, Moments, corrected_bias, corrected_target, loss_of
from .fisher import SampledTargets

__all__ = ["compress_sequentially", "evaluating", "fit_layers", "fitting_mask", "input_rows", "layer_moments"]


class _Dense(Protocol):
    """Whatever approximates a weight."""

    def to_dense(self) -> Tensor:
        """The (m, n) matrix."""


M = TypeVar("M", bound=_Dense)


PATCHES = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
"""What of a convolution decides which patches of its input it sees."""


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows that its weight matrix multiplies.

    Args:
        module: Linear-like, nn.Conv1d or nn.Conv2d.
        x: Its input.

    Returns:
        (..., n): x itself, or the patches that a convolution sees, (batch, positions, c_in * kernel size).
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation = x[..., None, :], (1, *kernel), (1, *dilation)
        padding, stride = (0, *padding), (1, *stride)
    if x.dim() == 3:
        x = x[None]
    return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)


class _SeenError(Exception):
    """Ends a forward pass once every wanted input was seen."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Compressed:
    """Dense stand-ins for the layers done so far, switched on and off without touching the model's parameters."""

    def __init__(self) -> None:
        self.done: list[tuple[nn.Module, Tensor, Tensor | None]] = []

    def add(self, module: nn.Module, estimate: Tensor, shift: Tensor | None) -> None:
        weight: Any = module.weight
        stand_in = stored_weight(module, estimate)
        shift = None if shift is None else shift.to(weight)
        if shift is not None and isinstance(module, nn.Conv1d | nn.Conv2d):
            shift = shift.reshape(-1, *[1] * len(module.kernel_size))
        self.done.append((module, stand_in, shift))

    @contextmanager
    def active(self) -> Iterator[None]:
        kept, handles = [], []
        try:
            for module, stand_in, shift in self.done:
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


def _inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object], *, stop: bool
) -> dict[str, list[Tensor]]:
    """Inputs of each call of each layer during one forward pass, in order of first execution."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, []).append(x.detach())
            # A module may run several times in a pass; only a single-use group may end it early.
            if stop and len(seen) == len(layers):
                raise _SeenError

        return record

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        run()
    except _SeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _groups(seen: Mapping[str, Sequence[Tensor]], layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names whose inputs are the same rows, in order of first execution: they share their moments."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        patches = tuple(getattr(layers[name], part, None) for part in PATCHES)
        groups.setdefault((patches, *((x.data_ptr(), x.shape, x.stride()) for x in inputs)), []).append(name)
    return list(groups.values())


def fitting_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask in the shape of the samples, where it speaks of them (pooled or patch inputs have no padding)."""
    if mask is None or mask.numel() != rows.shape[:-1].numel():
        return None
    return mask.reshape(rows.shape[:-1])


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
    :mod:`gblr_plugin.calibration.batches`). Layers that share an input share its moments. Costs two passes, each
    up to the layer, per distinct input and batch; one pass in all where the calibration is not sequential.

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
    compressed = _Compressed()
    batches, sequential = calibration.batches, calibration.sequential
    slopes = layer_moments(model, layers, calibration, gradients=True)[1] if calibration.loss else {}
    with evaluating(model):
        seen = _inputs(model, layers, lambda: calibration.forward(model, batches[0]), stop=False)
        missing = [name for name in layers if name not in seen]
        if missing:
            raise ConfigError(f"calibration: layer {missing[0]!r} is never run by the model's forward pass")
        once = {name for name, inputs in seen.items() if len(inputs) == 1}
        groups = _groups(seen, layers)
        seen.clear()
        stages = [[group] for group in groups] if sequential else [groups]
        names = iter(track([name for group in groups for name in group], "decomposing"))
        for stage in stages:
            moments = _stage_moments(model, layers, stage, calibration, compressed, once)
            for group in stage:
                metrics: dict[bool, Metric] = {}
                for name in group:
                    next(names)
                    module, held = layers[name], moments[group[0]]
                    centred = module.bias is not None
                    cross, square = held.second(centred=centred)
                    try:
                        if centred not in metrics:
                            # Inputs that never change (all predecessors cut off) say nothing: the weight itself counts.
                            known = float(square.diagonal().sum()) > 0
                            metrics[centred] = Metric.from_moment(square, calibration.damping) if known else Metric()
                        weight, metric = weight_matrix(module), metrics[centred]
                        corrected = sequential and metric.root is not None
                        target = corrected_target(weight, cross, metric) if corrected else weight.double()
                        if name in slopes:
                            metric = metric.weighted(slopes[name], calibration.damping)
                        matrix = fit(name, target, metric)
                    except ConfigError as error:
                        raise ConfigError(f"layer {name!r}: {error}") from error
                    estimate = matrix.to_dense()
                    bias: Any = module.bias
                    shift = corrected_bias(None, weight, estimate, *held.mean) if centred else None
                    results[name] = matrix, None if shift is None else (bias.double() + shift).to(bias.dtype)
                    if sequential:
                        compressed.add(module, estimate, shift)
        next(names, None)  # the progress line is taken away
    return results


def compress_sequentially(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
    budget: float | Mapping[str, float],
    *,
    mask: Callable[[Any], Tensor | None] | None = None,
    sequential: bool = True,
    method: str = "gblr",
    align: int | tuple[int, int] = 1,
    max_components: int | None = None,
    row_splits: Mapping[str, int] | None = None,
    damping: float = DAMPING,
    seed: int = 0,
) -> dict[str, tuple[StructuredMatrix, Tensor | None]]:
    """Calibrated approximations of the layers of a model, see :func:`fit_layers`.

    Args:
        model: In any training mode; unchanged on return.
        layers: Modules of the model by name: Linear, Conv1d, Conv2d or Hugging Face ``Conv1D``.
        batches: Calibration batches; read once and kept.
        forward: ``forward(model, batch)`` runs the model on a batch; its result is not used.
        budget: Relative FLOPs in (0, 1], one for all or by name.
        mask: ``mask(batch)`` is non-zero for samples that count, in the shape of the inputs without their features.
        sequential: ``False`` fits every layer to the inputs of the original model instead: one pass in all.
        method: As in :func:`~gblr_plugin.decomposition.decompose`.
        align: As there.
        max_components: As there.
        row_splits: Matrices packed in the rows of a layer's weight, by name; 1 where absent.
        damping: As there.
        seed: As there.

    Returns:
        By name, the approximation and the (m,) corrected bias (``None`` for a layer without one), both in the dtype of
        the weight.

    Raises:
        ConfigError: If there is nothing to calibrate on, a layer cannot be structured or is never run, or a
            decomposition fails; the message names the layer.
    """

    def fit(name: str, target: Tensor, metric: Metric) -> StructuredMatrix:
        return decompose(
            target,
            budget if isinstance(budget, int | float) else budget[name],
            method=method,
            calibration=metric,
            align=align,
            max_components=max_components,
            row_splits=1 if row_splits is None else row_splits.get(name, 1),
            seed=seed,
        ).to(weight_matrix(layers[name]).dtype)

    calibration = Calibration(list(batches), forward, mask, damping, sequential)
    return fit_layers(model, layers, calibration, fit)


def _stage_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stage: Sequence[Sequence[str]],
    calibration: Calibration,
    compressed: _Compressed,
    once: set[str],
) -> dict[str, Moments]:
    """Moments of the inputs of the first layer of each group, original against present."""
    firsts = {group[0]: layers[group[0]] for group in stage}
    stop = set(firsts) <= once
    moments: dict[str, Moments] = {}
    for batch in calibration.batches:
        run = partial(calibration.forward, model, batch)
        original = _inputs(model, firsts, run, stop=stop)
        present = original
        if compressed.done:
            with compressed.active():
                present = _inputs(model, firsts, run, stop=stop)
        valid = calibration.valid(batch)
        for name, module in firsts.items():
            for x0, x1 in zip(original[name], present[name], strict=True):
                rows = input_rows(module, x0)
                held = moments.setdefault(name, Moments(rows.shape[-1], rows.device))
                held.add(rows, None if x1 is x0 else input_rows(module, x1), fitting_mask(valid, rows))
    return moments


def layer_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, *, gradients: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments at the inputs and outputs of layers, over the original model.

    Layers that share an input share its moments.

    Args:
        model: In any training mode; unchanged on return.
        layers: Its modules by name.
        calibration: The batches; for ``gradients`` its forward must return the loss.
        gradients: Whether to take gradients.

    Returns:
        By layer the (n, n) moment of its inputs, centred where it has a bias, and the (m, m) sum over samples of the
        outer products of the loss gradient at its output, up to a factor common to all layers; the latter is empty
        without ``gradients``.

    Raises:
        ConfigError: If a layer is never run, or there is no loss.
    """
    moments: dict[str, Moments] = {}
    squares: dict[str, Tensor] = {}
    present: Tensor | None = None
    with evaluating(model), torch.no_grad():
        seen = _inputs(model, layers, lambda: calibration.forward(model, calibration.batches[0]), stop=False)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise ConfigError(f"calibration: layer {missing[0]!r} is never run by the model's forward pass")
    groups = _groups(seen, layers)
    seen.clear()
    firsts = {group[0] for group in groups}
    outputs: list[tuple[str, Tensor]] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if name in firsts:
            rows = input_rows(module, args[0] if args else next(iter(kwargs.values())))
            held = moments.setdefault(name, Moments(rows.shape[-1], rows.device))
            held.add(rows, mask=fitting_mask(present, rows))
        if not gradients:
            return output
        if not output.requires_grad:  # nothing before it trains: frozen parameters
            output.requires_grad_()
        outputs.append((name, output))
        return output.clone()  # what follows may change it in place

    handles = [module.register_forward_hook(partial(watch, name), with_kwargs=True) for name, module in layers.items()]
    try:
        drawing = SampledTargets() if gradients else nullcontext()
        drawn = keep_random_state(accelerators_of(model), seed=0)
        with evaluating(model), torch.set_grad_enabled(gradients), drawn, drawing:
            for batch in calibration.batches:
                present = calibration.valid(batch)
                outputs.clear()
                result = calibration.forward(model, batch)
                if gradients:
                    slopes = torch.autograd.grad(loss_of(result), [y for _, y in outputs], allow_unused=True)
                    for (name, y), slope in zip(outputs, slopes, strict=True):
                        g = _output_rows(layers[name], y if slope is None else slope)
                        square = g.T @ g if slope is not None else torch.zeros_like(g.T @ g)
                        squares[name] = squares[name] + square if name in squares else square
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for group in groups:
        for centred in (False, True):
            alike = [name for name in group if (layers[name].bias is not None) == centred]
            if alike:
                found |= dict.fromkeys(alike, moments[group[0]].second(centred=centred)[1])
    return {name: found[name] for name in layers}, squares


def _output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """(N, m) float64 rows of a layer's output, or of its gradient."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        dims = len(module.kernel_size)
        y = y.reshape(-1, *y.shape[-1 - dims :]).flatten(2).transpose(1, 2)
    return y.detach().reshape(-1, y.shape[-1]).double()
