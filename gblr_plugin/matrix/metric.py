"""The error that a decomposition minimises: ||R^T (W - W_hat) L||_F.

``L L^T`` is the second moment of the inputs and ``R R^T`` that of the loss gradients at the outputs; either may be I.
With both, the squared error is the second-order rise of the loss under the factored Fisher matrix (K-FAC).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["Metric"]

DAMPING = 1e-3
"""Default damping of a second moment, as a fraction of its mean diagonal."""


@dataclass(frozen=True, eq=False)
class Metric:
    """Norm of an (m, n) error matrix E: ``||R^T E L||_F``, with damped second moments ``R R^T`` and ``L L^T``.

    Args:
        moment: (n, n) float64 positive definite, or ``None`` for the Frobenius norm.
        root: (n, n) float64 lower Cholesky factor of ``moment``, or ``None``.
        level: What was added to the diagonal of the moment.
        gradient: (m, m) float64 positive definite second moment of output gradients, or ``None``. Only closed forms of
            low rank use it; other methods work with :meth:`of_inputs`.
    """

    moment: Tensor | None = None
    root: Tensor | None = None
    level: float = 0.0
    gradient: Tensor | None = None

    @classmethod
    def from_moment(cls, moment: Tensor, damping: float = DAMPING) -> Metric:
        """Damp and factor an (n, n) second moment.

        Args:
            moment: Symmetric positive semi-definite, any floating dtype.
            damping: Added to the diagonal, as a fraction of its mean; makes rank-deficient moments usable.

        Raises:
            ConfigError: If the moment is not positive semi-definite or is zero.
        """
        moment = moment.double()
        moment = (moment + moment.T) / 2
        level = float(moment.diagonal().mean())
        if not bool(moment.any()):
            raise ConfigError("calibration: the second moment is zero, there is no output to preserve")
        if not level > 0:
            raise ConfigError("calibration: the second moment is not positive semi-definite")
        level *= damping
        moment = moment + level * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        root, info = torch.linalg.cholesky_ex(moment)
        if int(info):
            raise ConfigError("calibration: the second moment is not positive semi-definite")
        return cls(moment, root, level)

    @classmethod
    def from_calibration(
        cls, where: str, calibration: Tensor | Metric | None, weight: Tensor, damping: float = DAMPING
    ) -> Metric:
        """The metric for the value of an argument ``calibration``.

        Args:
            where: Name of the function that takes the argument, for messages.
            calibration: (N, n) rows of inputs, their (n, n) second moment, a metric, or ``None``: the Frobenius norm.
            weight: (m, n) weight whose inputs these are; its device becomes the metric's.
            damping: As for :meth:`from_moment`.

        Raises:
            ConfigError: For another shape, entries that are not finite, or no input other than zero.
        """
        n = weight.shape[1]
        if calibration is None or isinstance(calibration, Metric):
            return calibration or cls()
        fits = isinstance(calibration, Tensor) and calibration.dim() == 2 and calibration.shape[1] == n
        if not fits or not len(calibration):
            given = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
            raise ConfigError(
                f"{where}: calibration must be (N, {n}) inputs or their ({n}, {n}) second moment, got {given}"
            )
        if not bool(torch.isfinite(calibration).all()):
            raise ConfigError(f"{where}: calibration holds NaN or infinite values")
        data = calibration.detach().to(device=weight.device, dtype=torch.float64)
        is_moment = len(data) == n and torch.allclose(data, data.T, rtol=1e-4, atol=1e-6 * float(data.abs().max()))
        return cls.from_moment(data if is_moment else data.T @ data / len(data), damping)

    def weighted(self, gradient: Tensor, damping: float = DAMPING) -> Metric:
        """The same metric of inputs, with outputs weighed by the (m, m) second moment of their loss gradients.

        If that moment is zero, the outputs are not weighed.
        """
        gradient = gradient.double()
        level = damping * float(gradient.diagonal().mean())
        if not level > 0:
            return self
        eye = torch.eye(len(gradient), dtype=torch.float64, device=gradient.device)
        return replace(self, gradient=(gradient + gradient.T) / 2 + level * eye)

    def for_rows(self, begin: int, end: int) -> Metric:
        """The metric of these rows of a weight alone."""
        return self if self.gradient is None else replace(self, gradient=self.gradient[begin:end, begin:end])

    def of_inputs(self) -> Metric:
        """The metric without its weights of outputs."""
        return replace(self, gradient=None)

    @cached_property
    def row_root(self) -> Tensor | None:
        """(m, m) lower Cholesky factor R of ``gradient``."""
        return None if self.gradient is None else torch.linalg.cholesky(self.gradient)

    def whiten_rows(self, matrix: Tensor) -> Tensor:
        """``R^T @ matrix`` for an (m, ...) matrix."""
        return matrix if self.row_root is None else self.row_root.T @ matrix

    def unwhiten_rows(self, matrix: Tensor) -> Tensor:
        """``R^-T @ matrix`` for an (m, ...) matrix."""
        if self.row_root is None:
            return matrix
        solved: Tensor = torch.linalg.solve_triangular(self.row_root.T, matrix, upper=True)
        return solved

    def whiten(self, matrix: Tensor) -> Tensor:
        """``matrix @ L`` for a (..., n) matrix."""
        return matrix if self.root is None else matrix @ self.root

    def unwhiten(self, matrix: Tensor) -> Tensor:
        """``matrix @ L^-1`` for a (..., n) matrix."""
        if self.root is None:
            return matrix
        solved: Tensor = torch.linalg.solve_triangular(self.root, matrix, upper=False, left=False)
        return solved

    def norm(self, matrix: Tensor) -> float:
        """``||R^T matrix L||_F``."""
        return float(torch.linalg.norm(self.whiten_rows(self.whiten(matrix.double()))))

    def relative_error(self, target: Tensor, estimate: Tensor) -> float:
        """``||R^T (target - estimate) L|| / ||R^T target L||``; 0 for a zero target met exactly."""
        scale = self.norm(target)
        error = self.norm(target.double() - estimate.double())
        return error / scale if scale > 0 else error
