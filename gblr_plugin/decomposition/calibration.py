r"""Moments of a layer's inputs, and the target and bias that they imply.

With x0 the inputs of the original network and x1 those that its compressed predecessors really produce, the best
approximation of the output W x0 + b by W_hat x1 + b' under E||.||^2 has, for any W_hat, the bias

    b' = b + W E[x0] - W_hat E[x1],

after which W_hat is a fit of W' = W C01 H^-1 in the metric H, where C01 = Cov(x0, x1) and H = Cov(x1), damped alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .metric import DAMPING, Metric

__all__ = ["Moments", "corrected_bias", "corrected_target"]


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
        self._cross = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._square = torch.zeros_like(self._cross)

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
        x0, x1 = x0 - self._origin, x0 - self._origin if present is None else x1 - self._origin
        self.count += len(x0)
        self._sum0 += x0.sum(0)
        self._sum1 += x1.sum(0)
        self._cross += x0.T @ x1
        self._square += x1.T @ x1

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
        cross = self._cross / self.count - torch.outer(mean0, mean1)
        square = self._square / self.count - torch.outer(mean1, mean1)
        if centred:
            return cross, square
        full0, full1 = self.mean
        return cross + torch.outer(full0, full1), square + torch.outer(full1, full1)


def corrected_target(weight: Tensor, cross: Tensor, moment: Tensor, damping: float = DAMPING) -> Tensor:
    """The matrix to fit where the inputs have changed: W' = W (E[x0 x1^T] + eps) (E[x1 x1^T] + eps)^-1.

    Args:
        weight: (m, n) original weight W.
        cross: (n, n) moment of original with present inputs.
        moment: (n, n) moment of the present inputs.
        damping: eps as a fraction of the mean diagonal of ``moment``; draws W' towards W where inputs say nothing.

    Returns:
        (m, n) float64; equal to W where ``cross`` equals ``moment``.
    """
    metric = Metric.from_moment(moment, damping)
    assert metric.root is not None
    level = damping * moment.double().diagonal().mean()
    image = weight.double() @ (cross.double() + level * torch.eye(len(cross), dtype=torch.float64, device=cross.device))
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
