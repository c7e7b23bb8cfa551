"""Trainable layers of the structure families, whose parameters are the factors of the family's matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import CONV_ATTRIBUTES, GBLRLayer, StructuredLayer
from ..layers.dense import check_structurable, structured_like, take_flags, weight_matrix
from ..matrix.structure import StructuredMatrix
from .base import FamilyMatrix
from .gblr import Gblr

__all__ = ["FamilyConv1d", "FamilyConv2d", "FamilyLayer", "FamilyLinear", "layer_like", "trainable"]


class FamilyLayer(StructuredLayer):
    """What the layers of all families share. The parameters are named as the factors of the family's matrix.

    Attributes:
        geometry: The matrix that the layer began with, on the meta device: what does not train.
    """

    geometry: FamilyMatrix

    def _init_factors(self, matrix: FamilyMatrix, bias: Tensor | None) -> None:
        self.geometry = matrix.to("meta")
        for name, value in matrix.factors().items():
            factor = value.detach().clone(memory_format=torch.contiguous_format)  # as a saved factor comes back
            setattr(self, name, nn.Parameter(factor))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def set_matrix(self, matrix: FamilyMatrix) -> None:
        """Take another matrix of the same shape, for instance that of a checkpoint, before optimizers are made."""
        old = next(iter(self.factors().values()))
        bias = self._parameters["bias"]
        for name in list(self._parameters):
            delattr(self, name)
        self._init_factors(matrix.to(device=old.device, dtype=old.dtype), None)
        for factor in self.factors().values():
            factor.requires_grad_(old.requires_grad)
        self.register_parameter("bias", bias)  # after the factors, as before: optimizers go by the order

    def matrix(self) -> FamilyMatrix:
        """The present matrix; its factors are the parameters themselves."""
        return self.geometry.with_factors(self.factors())

    def frozen_matrix(self) -> FamilyMatrix:
        """A detached copy of the present matrix."""
        return self.geometry.with_factors({name: value.detach().clone() for name, value in self.factors().items()})

    def frozen_structure(self) -> StructuredMatrix | None:
        """The matrix as a GBLR matrix of equal cost; ``None`` where there is none, or its rows are in another order."""
        matrix = self.frozen_matrix()
        structured = matrix.to_structured() if matrix.row_order is None else None
        return structured if structured is not None and structured.stored == matrix.multiply_adds else None

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors of the family's matrix."""
        return {name: getattr(self, name) for name in self.geometry.factors()}

    @property
    def structure_name(self) -> str:  # type: ignore[override]  # read alone
        """Name of the family, as the report shows it."""
        return self.geometry.name

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the weight matrix."""
        return self.geometry.shape

    @property
    def stored(self) -> int:
        """Number of stored factor entries."""
        return self.geometry.stored

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one matrix-vector product, or of one output position of a convolution."""
        return self.geometry.multiply_adds

    def to_dense(self) -> Tensor:
        """The (m, n) weight matrix; differentiable."""
        return self.matrix().to_dense()

    def extra_repr(self) -> str:
        """The module's own, the family and its cost."""
        return f"{super().extra_repr()}, family={self.structure_name}, relative_flops={self.relative_flops:.3g}"


class FamilyLinear(FamilyLayer, nn.Linear):
    """``y = x W^T + b`` with W of a family; takes the place of ``nn.Linear`` and Hugging Face ``Conv1D``.

    Args:
        matrix: Start of the (out_features, in_features) weight.
        bias: (out_features,) or ``None``.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    def __init__(self, matrix: FamilyMatrix, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there is no dense weight to allocate
        self.out_features, self.in_features = matrix.shape
        self._init_factors(matrix, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear's parameter, here computed
        """The dense (m, n) weight, computed on demand."""
        return self.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b`` by the factors."""
        return self.matrix().linear(input, self.bias)


class _FamilyConv(FamilyLayer):
    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]

    def __init__(self, matrix: FamilyMatrix, like: nn.Conv1d | nn.Conv2d, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not the convolution's: there is no dense weight to allocate
        expected = tuple(weight_matrix(like).shape)
        if matrix.shape != expected:
            raise ConfigError(f"{matrix.name}: the convolution's weight matrix is {expected}, got {matrix.shape}")
        for name in ("kernel_size", "stride"):  # of families that multiply step by step
            present, made_for = getattr(like, name), getattr(matrix, name, None)
            if made_for is not None and made_for != present:
                raise ConfigError(f"{matrix.name}: the convolution has {name} {present}, the matrix {made_for}")
        for name in CONV_ATTRIBUTES:
            setattr(self, name, getattr(like, name))
        self._init_factors(matrix, bias)

    @property
    def weight(self) -> Tensor:
        """The dense (c_out, c_in, *kernel) weight, computed on demand."""
        return self.to_dense().view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution, as the family computes it."""
        bias: Any = self.bias
        return self.matrix().convolve(self, input, bias)


class FamilyConv1d(_FamilyConv, nn.Conv1d):  # type: ignore[override]  # `weight` is computed, not a parameter
    """``nn.Conv1d`` whose (c_out, c_in * k) weight matrix is of a family.

    Args:
        matrix: Start of the weight matrix.
        like: The dense convolution whose geometry is taken over.
        bias: (c_out,) or ``None``.
    """


class FamilyConv2d(_FamilyConv, nn.Conv2d):  # type: ignore[override]  # `weight` is computed, not a parameter
    """``nn.Conv2d`` whose (c_out, c_in * kh * kw) weight matrix is of a family; arguments as :class:`FamilyConv1d`."""


def layer_like(dense: nn.Module, matrix: FamilyMatrix) -> FamilyLayer:
    """A trainable layer in place of a dense module.

    Args:
        dense: nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face ``Conv1D``.
        matrix: Start of its (m, n) weight matrix.

    Returns:
        The layer, with the dense module's bias, dtype, device, training mode and ``requires_grad`` flags.

    Raises:
        ConfigError: If the kind of module cannot be structured.
    """
    check_structurable(dense, type(dense).__name__)
    weight: Any = dense.weight
    bias: Any = dense.bias
    matrix = matrix.to(device=weight.device, dtype=weight.dtype)
    layer: FamilyLayer
    if isinstance(dense, nn.Conv1d):
        layer = FamilyConv1d(matrix, dense, bias)
    elif isinstance(dense, nn.Conv2d):
        layer = FamilyConv2d(matrix, dense, bias)
    else:
        layer = FamilyLinear(matrix, bias)
    take_flags(layer, dense)
    return layer


def trainable(
    family: type[FamilyMatrix], dense: nn.Module, budget: float, *, weight: Tensor | None = None, **options: Any
) -> FamilyLayer | GBLRLayer:
    """A layer of a family in place of a dense one: the weight is projected, and the factors train.

    Args:
        family: See :func:`gblr_plugin.families.get`.
        dense: nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face ``Conv1D``.
        budget: Relative FLOPs in (0, 1].
        weight: (m, n) matrix to project in place of the layer's weight.
        options: As :meth:`FamilyMatrix.from_dense` takes them.

    Returns:
        The layer; of gblr a structured layer whose structure is frozen.

    Raises:
        ConfigError: If the layer, the budget or an option cannot be used.
    """
    options |= family.layer_options(dense)
    if issubclass(family, Gblr):
        options["trains"] = True
    matrix = family.from_dense(weight_matrix(dense) if weight is None else weight, budget, **options)
    if not isinstance(matrix, Gblr):
        return layer_like(dense, matrix)
    layer = structured_like(dense, matrix.structured, align=matrix.align)
    layer.use_low_rank_form()
    layer.freeze_structure()
    return layer
