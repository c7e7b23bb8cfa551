"""Second moments at the inputs and outputs of a model's layers, from one pass over the calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.random_state import accelerators_of, keep_random_state
from ..utils.running import evaluating
from .batches import Calibration, loss_of
from .fisher import SampledTargets
from .inputs import first_argument, fitting_mask, input_rows, output_rows, shared_inputs
from .moments import Moments

__all__ = ["layer_moments"]


class _Watch:
    """Forward hooks that add up the moments of layers' inputs, and keep outputs whose gradients are taken later.

    Args:
        layers: Layers by name.
        firsts: The layers whose inputs are looked at: one of each group that shares an input.
        keep_outputs: Whether to keep the outputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module], firsts: set[str], keep_outputs: bool) -> None:
        self._layers, self._firsts, self._keep_outputs = layers, firsts, keep_outputs
        self.moments: dict[str, Moments] = {}
        self.outputs: list[tuple[str, Tensor]] = []
        self.valid: Tensor | None = None  # which samples of the present batch count

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within this context the hooks are in place."""
        hooks = {name: partial(self._see, name) for name in self._layers}
        handles = [self._layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if name in self._firsts:
            rows = input_rows(module, first_argument(args, kwargs))
            held = self.moments.setdefault(name, Moments(rows.shape[-1], rows.device))
            held.add(rows, mask=fitting_mask(self.valid, rows))
        if not self._keep_outputs:
            return output
        if not output.requires_grad:  # nothing before it trains: frozen parameters
            output.requires_grad_()
        self.outputs.append((name, output))
        return output.clone()  # what follows may change it in place


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
    groups, _ = shared_inputs(model, layers, lambda: calibration.forward(model, calibration.batches[0]))
    watch = _Watch(layers, {group[0] for group in groups}, gradients)
    squares: dict[str, Tensor] = {}
    drawing = SampledTargets() if gradients else nullcontext()
    same_draws = keep_random_state(accelerators_of(model), seed=0)
    with watch.on(), evaluating(model), torch.set_grad_enabled(gradients), same_draws, drawing:
        for batch in calibration.batches:
            watch.valid = calibration.valid(batch)
            watch.outputs.clear()
            result = calibration.forward(model, batch)
            if gradients:
                _add_squares(squares, layers, watch.outputs, loss_of(result))
    found: dict[str, Tensor] = {}
    for group in groups:
        for centred in (False, True):
            alike = [name for name in group if (layers[name].bias is not None) == centred]
            if alike:
                found |= dict.fromkeys(alike, watch.moments[group[0]].second(centred=centred)[1])
    return {name: found[name] for name in layers}, squares


def _add_squares(
    squares: dict[str, Tensor], layers: Mapping[str, nn.Module], outputs: list[tuple[str, Tensor]], loss: Tensor
) -> None:
    """Add the outer products of the loss gradients at the outputs; an output that the loss ignores adds zeros."""
    slopes = torch.autograd.grad(loss, [y for _, y in outputs], allow_unused=True)
    for (name, y), slope in zip(outputs, slopes, strict=True):
        g = output_rows(layers[name], torch.zeros_like(y) if slope is None else slope)
        square = g.T @ g
        squares[name] = squares[name] + square if name in squares else square
