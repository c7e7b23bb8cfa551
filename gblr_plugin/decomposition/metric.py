"""The error that a decomposition minimises: ||(W - W_hat) L||_F, L L^T being the second moment of the inputs or I."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["Metric"]

DAMPING = 1e-3
"""Default damping of a second moment, as a fraction of its mean diagonal."""


@dataclass(frozen=True)
class Metric:
    """Norm of an (m, n) error matrix E: ``||E L||_F``, where ``L L^T`` is a damped second moment.

    Args:
        moment: (n, n) float64 positive definite, or ``None`` for the Frobenius norm.
        root: (n, n) float64 lower Cholesky factor of ``moment``, or ``None``.
        level: What was added to the diagonal of the moment.
    """

    moment: Tensor | None = None
    root: Tensor | None = None
    level: float = 0.0

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
        if not level > 0:
            raise ConfigError("calibration: the second moment is zero, there is no output to preserve")
        level *= damping
        moment = moment + level * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        root, info = torch.linalg.cholesky_ex(moment)
        if int(info):
            raise ConfigError("calibration: the second moment is not positive semi-definite")
        return cls(moment, root, level)

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
        """``||matrix L||_F``."""
        return float(torch.linalg.norm(self.whiten(matrix.double())))

    def relative_error(self, target: Tensor, estimate: Tensor) -> float:
        """``||(target - estimate) L|| / ||target L||``; 0 for a zero target met exactly."""
        scale = self.norm(target)
        error = self.norm(target.double() - estimate.double())
        return error / scale if scale > 0 else error
