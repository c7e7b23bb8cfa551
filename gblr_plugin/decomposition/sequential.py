"""Compress the layers of a model in order, each against the inputs that its compressed predecessors really produce."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..structure import StructuredMatrix
from ..swap import check_structurable, weight_matrix
from .api import decompose
from .calibration import Moments, corrected_bias, corrected_target
from .metric import DAMPING

__all__ = ["compress_sequentially", "input_rows"]


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
def _evaluating(model: nn.Module) -> Iterator[None]:
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
        self.done: list[tuple[nn.Module, Tensor, Tensor]] = []

    def add(self, module: nn.Module, estimate: Tensor, shift: Tensor) -> None:
        weight: Any = module.weight
        # Hugging Face's Conv1D stores its weight (in, out); weight_matrix then has other strides than the parameter.
        turned = weight.dim() == 2 and weight_matrix(module).stride() != weight.stride()
        stand_in = estimate.T.contiguous() if turned else estimate
        stand_in = stand_in.reshape(weight.shape).to(weight)
        shift = shift.to(weight)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
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


def _groups(seen: Mapping[str, Sequence[Tensor]]) -> list[list[str]]:
    """Names whose inputs are the same tensors, in order of first execution: they share their moments."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        key = tuple((x.data_ptr(), x.shape, x.stride()) for x in inputs)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _fitting_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask in the shape of the samples, where it speaks of them (pooled or patch inputs have no padding)."""
    if mask is None or mask.numel() != rows.shape[:-1].numel():
        return None
    return mask.reshape(rows.shape[:-1])


@torch.no_grad()
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
    apply: Callable[[str, StructuredMatrix, Tensor], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, tuple[StructuredMatrix, Tensor]]:
    """Calibrated approximations of the layers of a model.

    Moments are centred and leave padding out; the bias is corrected. Each layer is fitted against the inputs that its
    compressed predecessors produce, with the corrected target (see :mod:`gblr_plugin.decomposition.calibration`).
    Layers that share an input share its moments. Costs two passes, each up to the layer, per distinct input and batch.

    Args:
        model: In any training mode; unchanged on return unless ``apply`` changes it.
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
        apply: ``apply(name, matrix, bias)`` is called for every layer once all are done.
        progress: ``progress(name, index, total)`` is called before each layer is decomposed.

    Returns:
        By name, the approximation and the (m,) corrected bias, both in the dtype of the weight.

    Raises:
        ConfigError: If there is nothing to calibrate on, a layer cannot be structured or is never run, or a
            decomposition fails; the message names the layer.
    """
    batches = list(batches)
    if not batches:
        raise ConfigError("calibration: there are no batches")
    for name, module in layers.items():
        check_structurable(module, name)
    results: dict[str, tuple[StructuredMatrix, Tensor]] = {}
    compressed = _Compressed()
    with _evaluating(model):
        seen = _inputs(model, layers, lambda: forward(model, batches[0]), stop=False)
        missing = [name for name in layers if name not in seen]
        if missing:
            raise ConfigError(f"calibration: layer {missing[0]!r} is never run by the model's forward pass")
        once = {name for name, inputs in seen.items() if len(inputs) == 1}
        groups = _groups(seen)
        seen.clear()
        stages = [groups] if not sequential else [[group] for group in groups]
        for stage in stages:
            moments = _stage_moments(model, layers, stage, batches, forward, mask, compressed, once)
            for group in stage:
                for name in group:
                    if progress is not None:
                        progress(name, len(results), len(layers))
                    try:
                        matrix, bias, shift = _fit(
                            layers[name],
                            moments[group[0]],
                            budget if isinstance(budget, int | float) else budget[name],
                            damping,
                            sequential=sequential,
                            method=method,
                            align=align,
                            max_components=max_components,
                            row_splits=1 if row_splits is None else row_splits.get(name, 1),
                            seed=seed,
                        )
                    except ConfigError as error:
                        raise ConfigError(f"layer {name!r}: {error}") from error
                    results[name] = matrix, bias
                    if sequential:
                        compressed.add(layers[name], matrix.to_dense(), shift)
    if apply is not None:
        for name, (matrix, bias) in results.items():
            apply(name, matrix, bias)
    return results


def _stage_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stage: Sequence[Sequence[str]],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], object],
    mask: Callable[[Any], Tensor | None] | None,
    compressed: _Compressed,
    once: set[str],
) -> dict[str, Moments]:
    """Moments of the inputs of the first layer of each group, original against present."""
    firsts = {group[0]: layers[group[0]] for group in stage}
    stop = set(firsts) <= once
    moments: dict[str, Moments] = {}
    for batch in batches:
        original = _inputs(model, firsts, partial(forward, model, batch), stop=stop)
        present = original
        if compressed.done:
            with compressed.active():
                present = _inputs(model, firsts, partial(forward, model, batch), stop=stop)
        valid = None if mask is None else mask(batch)
        for name, module in firsts.items():
            for x0, x1 in zip(original[name], present[name], strict=True):
                rows = input_rows(module, x0)
                held = moments.setdefault(name, Moments(rows.shape[-1], rows.device))
                held.add(rows, None if x1 is x0 else input_rows(module, x1), _fitting_mask(valid, rows))
    return moments


def _fit(
    module: nn.Module, moments: Moments, budget: float, damping: float, *, sequential: bool, **settings: Any
) -> tuple[StructuredMatrix, Tensor, Tensor]:
    """Approximation, corrected bias, and what was added to the present bias."""
    weight = weight_matrix(module)
    cross, square = moments.second()
    target = corrected_target(weight, cross, square, damping) if sequential else weight.double()
    matrix = decompose(target, budget, calibration=square, damping=damping, **settings).to(weight.dtype)
    present: Tensor | None = None if module.bias is None else module.bias.detach()  # type: ignore[operator]  # a tensor
    bias = corrected_bias(present, weight, matrix.to_dense(), *moments.mean)
    shift = bias if present is None else bias - present.double()
    return matrix, bias.to(weight.dtype), shift
