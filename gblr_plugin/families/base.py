"""The protocol of every structure family: a frozen (m, n) matrix with its product, cost and trainable form."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import BudgetError, ConfigError
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix

__all__ = ["FamilyMatrix", "check_count", "check_weight", "options_of", "output_metric", "too_small"]

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
            ConfigError: If the budget does not pay for the family's smallest member, or an option is unknown or out of
                range.
        """
        target = check_weight(cls.name, weight, budget)
        known = inspect.signature(cls._project).parameters.keys() - {"weight", "allowed", "metric"}
        for option in options:
            if option not in known | {"row_splits", "calibration"}:
                allowed_names = ", ".join(sorted(known | {"row_splits", "calibration"}))
                raise ConfigError(f"{cls.name}: no option {option!r}; allowed are {allowed_names}")
        row_splits = 1 if "row_splits" in known else options.pop("row_splits", 1)
        if row_splits != 1:
            from .stacked import stack  # is a matrix of this protocol itself

            return stack(cls, weight, budget, row_splits, options)
        if "calibration" not in known:
            options["metric"] = output_metric(cls.name, options.pop("calibration", None), target)
        m, n = target.shape
        allowed = math.floor(budget * m * n + 1e-6)  # the slack undoes the rounding of cost / (m n)
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        with torch.no_grad():
            return cls._project(target, allowed, **options).to(dtype)

    @classmethod
    @abstractmethod
    def _project(cls: type[Self], weight: Tensor, allowed: int, *args: Any, **options: Any) -> Self:
        """The closest member found, in float64, for ``allowed`` multiply-adds; options are keyword-only arguments."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """Number of stored factor entries."""

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

    # -- trainable form -----------------------------------------------------------------------------------------------

    def convolve(self, conv: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution ``conv`` with this matrix as its (c_out, c_in * prod(kernel)) weight."""
        kernel = self.to_dense().view(conv.out_channels, conv.in_channels, *conv.kernel_size)
        output: Tensor = conv._conv_forward(x, kernel, bias)
        return output

    def module_like(self, dense: nn.Module) -> nn.Module:
        """A trainable module with this weight in place of a dense one."""
        from .layers import layer_like  # the layers hold matrices of this protocol

        return layer_like(dense, self)

    @classmethod
    def trainable(cls, dense: nn.Module, budget: float, **options: Any) -> nn.Module:
        """The trainable form of a dense module: project its weight, then :meth:`module_like`."""
        from ..layers.dense import weight_matrix  # imports the GBLR layers

        return cls.from_dense(weight_matrix(dense), budget, **options).module_like(dense)

    @classmethod
    def budgets(cls, weights: Mapping[str, Tensor], budget: float, **options: Any) -> dict[str, float]:
        """Split one budget over several matrices; uniform unless the family defines an allocation of its own.

        Args:
            weights: (m, n) matrices by layer name.
            budget: Relative FLOPs of all together, in (0, 1].
            options: As :meth:`from_dense` takes them; ``row_splits`` also by name.

        Returns:
            A budget for each name.
        """
        return dict.fromkeys(weights, budget)


def options_of(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A family's options for one layer: ``row_splits`` and ``align`` may be given by name, 1 where absent."""
    own = {**options, "row_splits": options.get("row_splits", 1)}
    return {
        key: value.get(name, 1) if key in ("row_splits", "align") and isinstance(value, Mapping) else value
        for key, value in own.items()
    }


def check_weight(family: str, weight: Tensor, budget: float) -> Tensor:
    """The (m, n) weight in float64, once it and the budget are seen to be usable.

    Raises:
        ConfigError: Unless the weight is a finite 2-d floating-point tensor and the budget a number in (0, 1].
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point or not weight.numel():
        what = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"{family}: weight must be a non-empty 2-d floating-point tensor (m, n), got {what}")
    if weight.is_meta:
        raise ConfigError(f"{family}: weight is on the meta device, it has no values to approximate")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ConfigError(f"{family}: budget must be a number in (0, 1], got {budget!r}")
    weight = weight.detach().double()
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{family}: weight holds NaN or infinite values")
    return weight


def output_metric(family: str, calibration: Tensor | Metric | None, weight: Tensor) -> Metric:
    """The norm of output errors over calibration inputs; the Frobenius norm without any.

    Raises:
        ConfigError: Unless the inputs are finite (N, n) rows or an (n, n) second moment.
    """
    if calibration is None:
        return Metric()
    if isinstance(calibration, Metric):
        return calibration
    n = weight.shape[1]
    if (
        not isinstance(calibration, Tensor)
        or calibration.dim() != 2
        or calibration.shape[1] != n
        or not len(calibration)
    ):
        what = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
        raise ConfigError(f"{family}: calibration must be (N, {n}) inputs or an ({n}, {n}) second moment, got {what}")
    data = calibration.detach().to(weight)
    if not bool(torch.isfinite(data).all()):
        raise ConfigError(f"{family}: calibration holds NaN or infinite values")
    is_moment = len(data) == n and torch.allclose(data, data.T, rtol=1e-4, atol=1e-6 * float(data.abs().max()))
    return Metric.from_moment(data if is_moment else data.T @ data / len(data))


def too_small(family: str, shape: torch.Size, allowed: int, least: int, what: str) -> BudgetError:
    """The error of a budget that does not pay for the smallest member of a family."""
    m, n = shape
    return BudgetError(
        f"{family}: the budget allows {allowed} of the {m * n} multiply-adds of a {m} x {n} matrix, fewer than the "
        f"{least} of {what}; raise the budget or leave this matrix dense"
    )


def check_count(family: str, name: str, value: Any, most: int) -> int:
    """An option that counts something: an int in [1, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{family}: {name} must be an integer from 1 to {most}, got {value!r}")
    return value
