r"""Moments of a layer's inputs, and how they correct its weight and bias once the layers before it are compressed.

Let x0 be the layer's inputs in the original network, and x1 its inputs behind compressed layers. The layer's original
output is W x0 + b. For any approximation W_hat, the bias that minimises E||W x0 + b - W_hat x1 - b'||^2 is

    b' = b + W E[x0] - W_hat E[x1].

With this bias, the best W_hat is the best approximation of W' = W C01 H^-1 in the metric H, where C01 = Cov(x0, x1) and
H = Cov(x1), with the same damping. A layer without a bias gets none: its moments are then not centred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.metric import Metric

__all__ = ["Moments", "corrected_target", "output_shift"]


class Moments:
    """Running first and second moments of pairs of inputs (x0, x1), in float64.

    Memory is O(n^2), whatever the number of samples. The first batch's mean is subtracted from all samples before they
    are summed, so that a large common offset costs no digits. Products of the samples of one call are summed in float32
    unless the samples are float64, in half the time; their rounding is far below the damping of any metric.

    Args:
        size: Number n of features.
        device: Device of the sums.
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
            self._origin = x0.mean(0).double()  # exactly what is subtracted below
        same = x1 is x0
        origin = self._origin.to(x0.dtype)
        x0 = x0 - origin
        x1 = x0 if same else x1 - origin
        self.count += len(x0)
        self._sum0 += x0.sum(0, dtype=torch.float64)
        self._sum1 += x1.sum(0, dtype=torch.float64)
        square = (x1.T @ x1).double()
        if not same and self._cross is None:
            self._cross = self._square.clone()
        if self._cross is not None:
            self._cross += square if same else (x0.T @ x1).double()
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
        return rows.to(self._sum0.device, torch.promote_types(rows.dtype, torch.float32))

    def all_reduce(self) -> None:
        """Add up the samples of all processes of ``torch.distributed``; original and present inputs are the same."""
        total = torch.zeros(self.size + 1, self.size + 1, dtype=torch.float64, device=self._square.device)
        if self.count:
            total[0, 0] = self.count
            total[0, 1:] = self.count * self.mean[1]
            total[1:, 1:] = self.count * self.second(centred=False)[1]
        torch.distributed.all_reduce(total)
        self.count = int(total[0, 0])
        if self.count:
            self._origin = total[0, 1:] / self.count
            self._sum0, self._sum1 = torch.zeros_like(self._origin), torch.zeros_like(self._origin)
            self._square = total[1:, 1:] - self.count * torch.outer(self._origin, self._origin)

    def state_dict(self) -> dict[str, Any]:
        """The number of samples and the sums, where original and present inputs are the same."""
        origin = None if self._origin is None else self._origin.clone()
        return {"count": self.count, "origin": origin, "sum": self._sum1.clone(), "square": self._square.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        device = self._square.device
        self.count, origin = int(state["count"]), state["origin"]
        self._origin = None if origin is None else origin.to(device)
        self._sum0, self._sum1 = state["sum"].to(device), state["sum"].to(device).clone()
        self._square = state["square"].to(device).clone()

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
        metric: Metric of the present inputs' moment; its damping eps draws W' towards W in directions without inputs.

    Returns:
        (m, n) float64; equal to W where ``cross`` equals the moment.
    """
    assert metric.root is not None
    eye = torch.eye(len(cross), dtype=torch.float64, device=cross.device)
    image = weight.double() @ (cross.double() + metric.level * eye)
    return torch.cholesky_solve(image.T, metric.root).T


def output_shift(weight: Tensor, estimate: Tensor, mean_original: Tensor, mean_present: Tensor) -> Tensor:
    """(m,) float64 W E[x0] - W_hat E[x1], which is added to the bias when W_hat replaces the weight.

    Args:
        weight: (m, n) original weight W.
        estimate: (m, n) approximation W_hat.
        mean_original: (n,) float64 E[x0].
        mean_present: (n,) float64 E[x1].
    """
    return weight.double() @ mean_original - estimate.double() @ mean_present
