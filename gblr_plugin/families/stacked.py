"""Matrices of one family stacked along the rows: packed projections, such as query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from .base import FamilyMatrix

__all__ = ["Stacked", "stack"]


@dataclass(frozen=True, eq=False)
class Stacked(FamilyMatrix):
    """``W = [W_1; ...; W_s]``, each of the same family and shape; costs the sum of the parts.

    Args:
        parts: The s matrices. Their factors are named with the part's number at the end.
    """

    parts: tuple[FamilyMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.parts[0].name)  # shown as the family, which it is

    @classmethod
    def _project(cls, weight: Tensor, allowed: int, *args: Any, **options: Any) -> Stacked:
        raise ConfigError("stacked: project by a family's from_dense with row_splits")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.parts[0].shape
        return m * len(self.parts), n

    @property
    def stored(self) -> int:
        """Sum over the parts."""
        return sum(part.stored for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """Sum over the parts."""
        return sum(part.multiply_adds for part in self.parts)

    def factors(self) -> dict[str, Tensor]:
        """The factors of all parts."""
        named = [(i, name, value) for i, part in enumerate(self.parts) for name, value in part.factors().items()]
        return {f"{name}_{i}": value for i, name, value in named}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Stacked:
        """The same geometry with other factors."""
        return Stacked(
            tuple(
                part.with_factors({name: factors[f"{name}_{i}"] for name in part.factors()})
                for i, part in enumerate(self.parts)
            )
        )

    def to_dense(self) -> Tensor:
        """The parts above each other."""
        return torch.cat([part.to_dense() for part in self.parts])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The parts' products beside each other."""
        y = torch.cat([part.linear(x) for part in self.parts], dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    def to_structured(self) -> StructuredMatrix | None:
        """A GBLR matrix with s row splits, where the parts are GBLR matrices in their own row order."""
        matrices = [part.to_structured() for part in self.parts if part.row_order is None]
        known = [matrix for matrix in matrices if matrix is not None]
        if len(known) < len(self.parts):
            return None
        return StructuredMatrix.cat(known, 0)


def stack(
    family: type[FamilyMatrix], weight: Tensor, budget: float, row_splits: Any, options: dict[str, Any]
) -> Stacked:
    """Project each of ``row_splits`` equal parts of the rows with the same budget.

    Raises:
        ConfigError: If the rows do not divide.
    """
    if isinstance(row_splits, bool) or not isinstance(row_splits, int) or row_splits < 1 or len(weight) % row_splits:
        raise ConfigError(
            f"{family.name}: row_splits must be a positive divisor of the {len(weight)} rows, got {row_splits!r}"
        )
    metric, rows = options.get("calibration"), len(weight) // row_splits
    parts = []
    for index, part in enumerate(weight.chunk(row_splits)):
        if isinstance(metric, Metric):
            options = {**options, "calibration": metric.for_rows(index * rows, (index + 1) * rows)}
        parts.append(family.from_dense(part, budget, **options))
    return Stacked(tuple(parts))
