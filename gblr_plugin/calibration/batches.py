r"""Training batches as calibration: moments of a layer's inputs, and the target and bias that they imply.

With x0 the inputs of the original network and x1 those that its compressed predecessors really produce, the best
approximation of the output W x0 + b by W_hat x1 + b' under E||.||^2 has, for any W_hat, the bias

    b' = b + W E[x0] - W_hat E[x1],

after which W_hat is a fit of W' = W C01 H^-1 in the metric H, where C01 = Cov(x0, x1) and H = Cov(x1), damped alike.
A layer without a bias gets none: its moments are then not centred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..matrix.metric import DAMPING, Metric
from ..utils.validation import check_count, check_flag, check_share

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "Moments",
    "attention_mask",
    "corrected_bias",
    "corrected_target",
    "loss_of",
]


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
        return next((attention_mask(part) for part in batch if isinstance(part, Mapping)), None)
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
        damping: Of the second moments, as a fraction of their mean diagonal.
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


class Moments:
    """Running first and second moments of pairs of inputs (x0, x1), in float64.

    Memory is O(n^2), whatever the number of samples. Sums are kept about the first batch's mean, so that a large common
    offset costs no digits.

    Args:
        size: Number n of features.
        device: Where the sums live.
    """

    def __init__(self, size: int, device: torch.device | str | None = None) -> None:
        self.size = size
        self.count = 0
        self._origin: Tensor | None = None
        self._sum0 = torch.zeros(size, dtype=torch.float64, device=device)
        self._sum1 = torch.zeros_like(self._sum0)
        self._square = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross: Tensor | None = None  # equal to the square until a present input differs

    def add(self, original: Tensor, present: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add samples.

        Args:
            original: (..., n) inputs x0.
            present: (..., n) inputs x1 of the same samples; ``None`` where they are the same.
            mask: (...) true (or non-zero) for samples that count; padding is left out.

        Raises:
            ConfigError: If shapes do not fit, or a counted sample is not finite.
        """
        x0 = self._rows(original, mask)
        x1 = x0 if present is None else self._rows(present, mask)
        if x0.shape != x1.shape:
            raise ConfigError(
                f"moments: original and present inputs must be of one shape, got {tuple(original.shape)} "
                f"and {'nothing' if present is None else tuple(present.shape)}"
            )
        if not len(x0):
            return
        if self._origin is None:
            self._origin = x0.mean(0)
        same = x1 is x0
        x0 = x0 - self._origin
        x1 = x0 if same else x1 - self._origin
        self.count += len(x0)
        self._sum0 += x0.sum(0)
        self._sum1 += x1.sum(0)
        square = x1.T @ x1
        if not same and self._cross is None:
            self._cross = self._square.clone()
        if self._cross is not None:
            self._cross += square if same else x0.T @ x1
        self._square += square

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.shape[-1] != self.size:
            raise ConfigError(f"moments: inputs must have {self.size} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.size)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ConfigError(f"moments: mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
            rows = rows[mask.reshape(-1).to(rows.device) != 0]
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError("moments: inputs hold NaN or infinite values")
        return rows.to(device=self._sum0.device, dtype=torch.float64)

    def _centre(self) -> Tensor:
        if self._origin is None:
            raise ConfigError("moments: no samples were added (is everything masked out?)")
        return self._origin

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """(E[x0], E[x1]), each (n,) float64."""
        origin = self._centre()
        return origin + self._sum0 / self.count, origin + self._sum1 / self.count

    def second(self, *, centred: bool = True) -> tuple[Tensor, Tensor]:
        """(E[x0 x1^T], E[x1 x1^T]), each (n, n) float64; covariances where ``centred``."""
        self._centre()
        mean0, mean1 = self._sum0 / self.count, self._sum1 / self.count
        cross_sum = self._square if self._cross is None else self._cross
        cross = cross_sum / self.count - torch.outer(mean0, mean1)
        square = self._square / self.count - torch.outer(mean1, mean1)
        if centred:
            return cross, square
        full0, full1 = self.mean
        return cross + torch.outer(full0, full1), square + torch.outer(full1, full1)


def corrected_target(weight: Tensor, cross: Tensor, metric: Metric) -> Tensor:
    """The matrix to fit where the inputs have changed: W' = W (E[x0 x1^T] + eps) (E[x1 x1^T] + eps)^-1.

    Args:
        weight: (m, n) original weight W.
        cross: (n, n) moment of original with present inputs.
        metric: Of the moment of the present inputs; its damping eps draws W' towards W where inputs say nothing.

    Returns:
        (m, n) float64; equal to W where ``cross`` equals the moment.
    """
    assert metric.root is not None
    eye = torch.eye(len(cross), dtype=torch.float64, device=cross.device)
    image = weight.double() @ (cross.double() + metric.level * eye)
    return torch.cholesky_solve(image.T, metric.root).T


def corrected_bias(
    bias: Tensor | None, weight: Tensor, estimate: Tensor, mean_original: Tensor, mean_present: Tensor
) -> Tensor:
    """The best bias, b' = b + W E[x0] - W_hat E[x1]: (m,) float64.

    Args:
        bias: (m,) or ``None``.
        weight: (m, n) original weight.
        estimate: (m, n) approximation that replaces it.
        mean_original: (n,) E[x0].
        mean_present: (n,) E[x1].
    """
    shift = weight.double() @ mean_original - estimate.double() @ mean_present
    return shift if bias is None else bias.double() + shift
