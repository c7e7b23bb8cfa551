"""Training batches for calibration: which ones, how the model takes them, and how a run sets that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..matrix.metric import DAMPING
from ..utils.validation import check_count, check_flag, check_share

__all__ = ["Calibration", "CalibrationSettings", "attention_mask", "loss_of"]


@dataclass(frozen=True)
class CalibrationSettings:
    """How a run calibrates one-shot compression.

    Args:
        batches: Number of training batches passed through the model.
        damping: Added to the diagonal of the inputs' second moment, as a fraction of its mean.
        sequential: Fit each layer to what its compressed predecessors produce, instead of to the original inputs.
        loss: Weigh output errors by what they do to the loss: one more pass, with gradients.
    """

    batches: int = 8
    damping: float = DAMPING
    sequential: bool = True
    loss: bool = True

    def __post_init__(self) -> None:
        check_count("batches", self.batches)
        check_share("damping", self.damping)
        check_flag("sequential", self.sequential)
        check_flag("loss", self.loss)

    @classmethod
    def read(cls, value: CalibrationSettings | Mapping[str, Any] | bool | None) -> CalibrationSettings | None:
        """Settings as a caller may write them: an object, a table of its fields, ``True`` for the defaults.

        Raises:
            ConfigError: For an unknown key or a value out of range.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        known = tuple(cls.__dataclass_fields__)
        if not isinstance(value, Mapping):
            raise ConfigError(f"calibration: need a table of {', '.join(known)}, or true, got {value!r}")
        unknown = [key for key in value if key not in known]
        if unknown:
            raise ConfigError(f"calibration: unknown key {unknown[0]!r} (allowed: {', '.join(known)})")
        try:
            return cls(**value)
        except ConfigError as error:
            raise ConfigError(f"calibration: {error}") from error


def attention_mask(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a batch that is a table, or of the first table in a tuple or list; else ``None``."""
    if isinstance(batch, Mapping):
        return batch.get("attention_mask")
    if isinstance(batch, (tuple, list)):
        return next((attention_mask(table) for table in batch if isinstance(table, Mapping)), None)
    return None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Training batches and how the model takes them.

    Args:
        batches: Any kind of batches.
        forward: ``forward(model, batch)`` runs the model. Its result is looked at only where loss sensitivities are
            asked for: the loss, a table that holds it as ``"loss"``, or a tuple that begins with it. Losses of
            ``torch.nn.functional`` then get targets drawn from the model's own predictions, see
            :class:`~gblr_plugin.calibration.fisher.SampledTargets`.
        mask: ``mask(batch)`` is non-zero for samples that count, in the shape of the layers' inputs without their
            features, or ``None``; by default the batch's ``attention_mask``, so that padding is left out.
        damping: Damping of the second moments, as a fraction of their mean diagonal.
        sequential: Fit each layer to what its compressed predecessors produce.
        loss: Weigh output errors by what they do to the loss, with the Fisher matrix factored as E[x x^T] times
            E[g g^T], g being the loss gradient at the layer's output (K-FAC, Martens & Grosse 2015). Low-rank closed
            forms use it (``low_rank``, and GBLR's trapezoids).

    Raises:
        ConfigError: If there is no batch, or they come from a generator.
    """

    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], object]
    mask: Callable[[Any], Tensor | None] | None = attention_mask
    damping: float = DAMPING
    sequential: bool = True
    loss: bool = False

    def __post_init__(self) -> None:
        if not hasattr(self.batches, "__len__"):
            raise ConfigError(
                f"calibration: batches are passed through the model more than once; give a list, not a "
                f"{type(self.batches).__name__}"
            )
        if not len(self.batches):
            raise ConfigError("calibration: there are no batches")

    def valid(self, batch: Any) -> Tensor | None:
        """The mask of a batch."""
        return None if self.mask is None else self.mask(batch)


def loss_of(result: object) -> Tensor:
    """The scalar loss in what a training step returned.

    Raises:
        ConfigError: If there is none that gradients could be taken of.
    """
    if isinstance(result, Mapping):
        result = result.get("loss")
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
        what = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(
            f"calibration: loss sensitivities need a forward or training step that returns the loss, got {what}"
        )
    return result
