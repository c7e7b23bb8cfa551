"""List the weight matrices of a model: everything that it multiplies activations by, in layers of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers import StructuredLayer
from ..layers.dense import KINDS, structurable, weight_matrix
from ..layers.full import FULL
from ..tensor.frozen import FROZEN

__all__ = ["WeightMatrix", "is_layer", "weight_matrices", "weight_shape"]

_NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Modules that look a weight up or multiply by it entry by entry."""


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight matrix, or a stack of them in one parameter.

    Args:
        name: Name of the module; of the parameter, if the module has several or is no layer.
        module: Holds the parameter.
        parameter: Its name there.
        shape: (m, n); the matrices of a stack are put on top of each other.
    """

    name: str
    module: nn.Module
    parameter: str
    shape: tuple[int, int]

    @property
    def entries(self) -> int:
        """Entries of the dense matrix, which are its multiply-adds for one position, such as a token."""
        return self.shape[0] * self.shape[1]


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a layer with one weight matrix, which can be structured, is structured, or is converted."""
    return structurable(module) or isinstance(module, (StructuredLayer, *FROZEN, *FULL))


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(m, n) of a layer's weight matrix."""
    if isinstance(module, StructuredLayer):
        return module.matrix_shape
    weight: Any = module.weight
    if structurable(module) and type(weight.data) is Tensor:
        shape = weight_matrix(module).shape
        return shape[0], shape[1]
    return weight.shape[0], math.prod(weight.shape[1:])


def weight_matrices(model: nn.Module) -> Iterator[WeightMatrix]:
    """List all weight matrices in the model's order: a shared module once, and nothing inside a structured layer.

    Besides the weights of layers these are parameters that other modules multiply by: those with ``weight`` in their
    names and at least two axes (packed projections of attention, recurrent and transposed layers), and those with
    three axes (the stacked matrices of experts).

    Args:
        model: Only looked at.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        if isinstance(module, StructuredLayer):
            inside.append(f"{name}.")
            yield WeightMatrix(name, module, "weight", weight_shape(module))
        elif is_layer(module) or isinstance(module, KINDS):
            inside += [f"{name}."] if is_layer(module) and name else []
            weight: Any = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and not is_lazy(weight):
                yield WeightMatrix(name, module, "weight", weight_shape(module))
        elif not isinstance(module, _NO_PRODUCT):
            for key, parameter in module._parameters.items():
                if parameter is not None and not is_lazy(parameter) and _multiplies(key, parameter):
                    full = key if not name else name if key == "weight" else f"{name}.{key}"
                    columns = parameter.shape[-1] if "weight" not in key else math.prod(parameter.shape[1:])
                    yield WeightMatrix(full, module, key, (parameter.numel() // max(columns, 1), columns))


def _multiplies(name: str, parameter: Tensor) -> bool:
    if "weight" in name:
        return parameter.dim() >= 2
    return parameter.dim() == 3 and min(parameter.shape) > 1
