"""Finds NaN and infinity in a training before an optimizer spreads them, and describes them in a file."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import GBLRError
from ..layers import GBLRLayer
from ..layers.distributed_parameters import all_finite, local_part
from ..utils.files import write_text
from ..utils.validation import check_choice

__all__ = ["NON_FINITE", "FiniteGuard", "drop_gradients", "find_cause", "gradients_finite", "save_diagnostic"]

NON_FINITE = ("stop", "skip")
"""What a training may do where gradients are not finite."""

_logger = logging.getLogger(__name__)
_CUDA_CHECK_EVERY = 32
_MOST_SKIPPED = 100  # steps skipped in a row, after which the training stops


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _tensors(layer: GBLRLayer) -> dict[str, Tensor]:
    """The parameters of a structured layer by name."""
    found = dict(layer.named_parameters(recurse=False))
    return {name: found[name] for name in ("widths", "locations", "U", "V", "bias") if name in found}


def gradients_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients of an optimizer's parameters are finite; all processes that share them get one answer.

    Gradients that a GradScaler checks inside a fused step are not checked here.
    """
    found_inf: Any = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf):
        return True
    return all_finite([parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None])


def drop_gradients(optimizer: Optimizer) -> None:
    """Take all gradients away: the step that follows changes neither parameters nor state."""
    for parameter in _parameters(optimizer):
        parameter.grad = None


def find_cause(layers: Mapping[str, GBLRLayer], gradients: bool = True) -> tuple[str, str] | None:
    """Name of the first layer and of its tensor with an entry that is not finite: parameters first, then gradients."""
    for of_gradient in (False, True)[: 1 + gradients]:
        for name, layer in layers.items():
            for what, parameter in _tensors(layer).items():
                tensor = parameter.grad if of_gradient else parameter
                if tensor is not None and not all_finite([tensor]):
                    return name, f"the gradient of {what}" if of_gradient else what
    return None


@torch.no_grad()
def _counts(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    values = local_part(tensor).detach()
    finite = torch.isfinite(values)
    largest = float(values[finite].abs().max()) if bool(finite.any()) else None
    return {"entries": values.numel(), "not_finite": int((~finite).sum()), "largest_finite": largest}


def save_diagnostic(
    layers: Mapping[str, GBLRLayer], facts: Mapping[str, Any], folder: str | os.PathLike[str] | None
) -> Path | None:
    """Write a JSON summary of every layer's values and gradients.

    Args:
        layers: Layers by name.
        facts: Of the training: step, loss, sigma, and so on; put first.
        folder: Where; ``None``, or one that cannot be written to: the system's folder of temporary files.

    Returns:
        The new file, or ``None`` where none could be written.
    """
    report: dict[str, Any] = {**facts, "layers": {}}
    for name, layer in layers.items():
        report["layers"][name] = {
            what: {"values": _counts(tensor), "gradient": _counts(tensor.grad)}
            for what, tensor in _tensors(layer).items()
        }
    text = json.dumps(report, indent=2) + "\n"
    for place in (folder, tempfile.gettempdir()):
        if place is None:
            continue
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=f"gblr-step{facts.get('step', 0)}-", suffix=".json", dir=place)
            os.close(handle)
            write_text(path, text)
        except OSError:
            continue
        return Path(path)
    return None


class FiniteGuard:
    """Ends a training, or leaves steps out, where gradients or the structure are NaN or infinite.

    Args:
        layers: Structured layers by name.
        non_finite: ``"stop"`` or ``"skip"``, see :class:`~gblr_plugin.StructureLearner`.
        folder: Where to write the diagnostic, or ``None``.
        facts: Gives the present step, progress and smoothness, for the diagnostic.

    Attributes:
        skipped_steps: Optimizer steps that were not taken.
        last_loss: A detached loss for the diagnostic, or ``None``.

    Raises:
        ConfigError: If ``non_finite`` is neither.
    """

    def __init__(
        self,
        layers: Mapping[str, GBLRLayer],
        non_finite: str,
        folder: str | os.PathLike[str] | None,
        facts: Callable[[], Mapping[str, Any]],
    ) -> None:
        check_choice("structure learner: non_finite", non_finite, NON_FINITE)
        self._layers, self._non_finite, self._folder, self._facts = layers, non_finite, folder, facts
        self.skipped_steps = 0
        self.last_loss: Tensor | None = None
        self._skipped_in_a_row = 0

    def check_structure(self, widths: Tensor) -> None:
        """Raise a GBLRError where widths (2, C) or locations are not finite; on CUDA looked at every 32nd step."""
        if widths.is_cuda and self._facts()["step"] % _CUDA_CHECK_EVERY:
            return  # reading the answer waits for the GPU
        # All widths first, which every process sees: all processes go on together, or none.
        locations = [layer.locations for layer in self._layers.values()]
        if not (bool(torch.isfinite(widths).all()) and all_finite(locations)):
            self.check_parameters()

    def check_parameters(self) -> None:
        """Raise a GBLRError where a parameter of a layer is not finite."""
        if (cause := find_cause(self._layers, gradients=False)) is not None:
            raise self._error(*cause)

    @torch.no_grad()
    def is_usable(self, optimizer: Optimizer) -> bool:
        """Whether the gradients of an optimizer may be used; raises where the training is to stop."""
        stops, step = self._non_finite == "stop", self._facts()["step"]
        on_cuda = any(layer.widths.is_cuda for layer in self._layers.values())
        if stops and on_cuda and step % _CUDA_CHECK_EVERY:
            return True
        if gradients_finite(optimizer):
            self._skipped_in_a_row = 0
            return True
        if stops or self._skipped_in_a_row >= _MOST_SKIPPED:
            raise self._error(*(find_cause(self._layers) or ("another", "the gradient of a parameter")))
        self.check_parameters()
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 1:
            _logger.warning("step %d: gradients are NaN or infinite; the step is skipped", step)
        return False

    def _error(self, name: str, what: str) -> GBLRError:
        """The error to raise; the diagnostic is written first."""
        known, loss = self._facts(), self.last_loss
        facts = {"step": known["step"], "layer": name, "what": what, "loss": None if loss is None else str(float(loss))}
        saved = save_diagnostic(self._layers, {**facts, **known, "skipped_steps": self.skipped_steps}, self._folder)
        return GBLRError(
            f"layer {name!r}: {what} became NaN or infinite at step {known['step']}; lower the learning rate or clip "
            f"gradients (details in {saved or 'no file: none could be written'})"
        )
