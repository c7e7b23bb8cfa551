"""The protocol of every structure family: a frozen (m, n) matrix with its product and its cost.

:class:`FamilyMatrix` is what a family implements; :class:`Stacked` holds several matrices of one family on top of each
other, as packed projections (query, key and value in one weight) need them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..utils.validation import check_row_splits
from .checks import check_weight

__all__ = ["FamilyMatrix", "Stacked"]

Self = TypeVar("Self", bound="FamilyMatrix")


class FamilyMatrix(ABC):
    """A structured (m, n) matrix of one family.

    Subclasses are frozen dataclasses: their floating-point tensor fields are the factors that train, everything else is
    geometry. All families count as GBLR does (paper Eq. 4): multiply-adds of one matrix-vector product over m * n.
    """

    name: ClassVar[str]

    @classmethod
    def from_dense(cls, weight: Tensor, budget: float, **options: Any) -> FamilyMatrix:
        """Project a dense matrix onto the family, in one shot.

        Args:
            weight: (m, n) floating point, finite.
            budget: Allowed relative FLOPs, in (0, 1].
            options: The family's own, see its class, and for every family:
                ``row_splits``: number of matrices stacked in the rows (packed query, key, value: 3), each projected by
                itself. ``calibration``: (N, n) input activations or their (n, n) second moment; the error minimised is
                then that of the output, with the whole moment or, where the class says so, its diagonal.

        Returns:
            A matrix with ``relative_flops <= budget`` in the dtype of the weight (float32 for half precision).

        Raises:
            ConfigError: If the budget is below the cost of the family's smallest member, or an option is unknown or out
                of range.
        """
        target = check_weight(cls.name, weight, budget)
        known = inspect.signature(cls._project).parameters.keys() - {"weight", "max_multiply_adds", "metric"}
        for option in options:
            if option not in known | {"row_splits", "calibration"}:
                allowed_names = ", ".join(sorted(known | {"row_splits", "calibration"}))
                raise ConfigError(f"{cls.name}: no option {option!r}; allowed are {allowed_names}")
        row_splits = 1 if "row_splits" in known else options.pop("row_splits", 1)
        if row_splits != 1:
            return _stack(cls, weight, budget, row_splits, options)
        if "calibration" not in known:
            options["metric"] = Metric.from_calibration(cls.name, options.pop("calibration", None), target)
        m, n = target.shape
        max_multiply_adds = math.floor(budget * m * n + 1e-6)  # the slack undoes the rounding of cost / (m n)
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        with torch.no_grad():
            return cls._project(target, max_multiply_adds, **options).to(dtype)

    @classmethod
    @abstractmethod
    def _project(cls: type[Self], weight: Tensor, max_multiply_adds: int, *args: Any, **options: Any) -> Self:
        """Find the closest member, in float64, of at most ``max_multiply_adds``.

        The family's options are keyword-only arguments, after ``metric``: the norm in which to be close.
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def stored(self) -> int:
        """Number of stored factor entries."""
        return sum(factor.numel() for factor in self.factors().values())

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The (m, n) matrix; differentiable in the factors."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` by the factors, for ``x`` of shape (..., n); returns (..., m)."""

    # -- counted alike ------------------------------------------------------------------------------------------------

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one matrix-vector product (for convolutions: of one output position)."""
        return self.stored

    @property
    def relative_flops(self) -> float:
        """Multiply-adds over those of the dense product, m * n."""
        m, n = self.shape
        return self.multiply_adds / (m * n)

    # -- frozen values ------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, Tensor]:
        """The factors that train, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_factors(self: Self, factors: Mapping[str, Tensor]) -> Self:
        """The same geometry with other factors."""
        return dataclasses.replace(self, **factors)  # type: ignore[type-var]  # subclasses are dataclasses

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the factors as :meth:`torch.Tensor.to`."""
        return self.with_factors({name: value.to(*args, **kwargs) for name, value in self.factors().items()})

    def to_structured(self) -> StructuredMatrix | None:
        """This matrix as a GBLR matrix, exactly; ``None`` where the family is not a special case of GBLR.

        Families with a fixed row order (``row_order``) give the GBLR matrix of the rows in that order.
        """
        return None

    @property
    def row_order(self) -> Tensor | None:
        """(m,) int64 with ``to_dense()[row_order] == to_structured().to_dense()``; ``None`` for the identity."""
        return None

    # -- in a model ---------------------------------------------------------------------------------------------------

    @classmethod
    def layer_options(cls, dense: nn.Module) -> dict[str, Any]:
        """Options of :meth:`from_dense` that follow from the dense layer whose weight is projected; by default none.

        Raises:
            ConfigError: If the family has no matrices for this kind of layer.
        """
        return {}

    def convolve(self, conv: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution ``conv`` with this matrix as its (c_out, c_in * prod(kernel)) weight."""
        kernel = self.to_dense().view(conv.out_channels, conv.in_channels, *conv.kernel_size)
        output: Tensor = conv._conv_forward(x, kernel, bias)
        return output

    @classmethod
    def budgets(
        cls,
        weights: Mapping[str, Tensor],
        budget: float,
        *,
        row_splits: Mapping[str, int] | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Split one budget over several matrices: all get the same, unless the family defines an allocation of its own.

        Args:
            weights: (m, n) matrices by layer name.
            budget: Relative FLOPs of all together, in (0, 1].
            row_splits: Number of matrices stacked in the rows of a weight, by layer name; 1 where absent.
            options: As :meth:`from_dense` takes them.

        Returns:
            Relative FLOPs by layer name.
        """
        return dict.fromkeys(weights, budget)


@dataclass(frozen=True, eq=False)
class Stacked(FamilyMatrix):
    """``W = [W_1; ...; W_s]``, each of the same family and shape; costs what they cost together.

    Args:
        matrices: The s matrices. The names of their factors end with the number of the matrix.
    """

    matrices: tuple[FamilyMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.matrices[0].name)  # shown as the family, which it is

    @classmethod
    def _project(cls, weight: Tensor, max_multiply_adds: int, *args: Any, **options: Any) -> Stacked:
        raise ConfigError("stacked: project by a family's from_dense with row_splits")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.matrices[0].shape
        return m * len(self.matrices), n

    @property
    def stored(self) -> int:
        """Stored entries of all matrices together."""
        return sum(matrix.stored for matrix in self.matrices)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all matrices together."""
        return sum(matrix.multiply_adds for matrix in self.matrices)

    def factors(self) -> dict[str, Tensor]:
        """The factors of all matrices."""
        named = [(i, name, value) for i, matrix in enumerate(self.matrices) for name, value in matrix.factors().items()]
        return {f"{name}_{i}": value for i, name, value in named}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Stacked:
        """The same geometry with other factors."""
        return Stacked(
            tuple(
                matrix.with_factors({name: factors[f"{name}_{i}"] for name in matrix.factors()})
                for i, matrix in enumerate(self.matrices)
            )
        )

    def to_dense(self) -> Tensor:
        """The matrices on top of each other."""
        return torch.cat([matrix.to_dense() for matrix in self.matrices])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The matrices' products beside each other."""
        y = torch.cat([matrix.linear(x) for matrix in self.matrices], dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    def to_structured(self) -> StructuredMatrix | None:
        """A GBLR matrix with s row splits, where all of them are GBLR matrices in their own row order."""
        structured = [matrix.to_structured() for matrix in self.matrices if matrix.row_order is None]
        known = [found for found in structured if found is not None]
        if len(known) < len(self.matrices):
            return None
        return StructuredMatrix.cat(known, 0)


def _stack(
    family: type[FamilyMatrix], weight: Tensor, budget: float, row_splits: Any, options: dict[str, Any]
) -> Stacked:
    """Project each of ``row_splits`` equal parts of the rows with the same budget.

    Raises:
        ConfigError: If the rows do not divide.
    """
    check_row_splits(f"{family.name}: row_splits", row_splits, len(weight))
    metric, rows = options.get("calibration"), len(weight) // row_splits
    matrices = []
    for index, split in enumerate(weight.chunk(row_splits)):
        if isinstance(metric, Metric):
            options = {**options, "calibration": metric.for_rows(index * rows, (index + 1) * rows)}
        matrices.append(family.from_dense(split, budget, **options))
    return Stacked(tuple(matrices))
