"""Give a model the GBLR layers that a state dict has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..matrix.structure import StructuredMatrix
from . import GBLRLayer
from .dense import replace_modules, structurable, structured_like, weight_matrix
from .separation import separate

__all__ = ["match_checkpoint"]


def _empty_structure(layer_shape: tuple[int, int], num: int, rows: int, like: Tensor) -> StructuredMatrix:
    splits = layer_shape[0] // rows
    return StructuredMatrix.from_factors(
        like.new_zeros(num, rows), like.new_zeros(num, layer_shape[1]), split_sizes=(num // splits,) * splits
    )


@torch.no_grad()
def match_checkpoint(
    model: nn.Module, state: Mapping[str, Any], align: Callable[[str, nn.Module], int | tuple[int, int]]
) -> list[str]:
    """Before a state dict is loaded: structure the dense layers that are structured in it, and fit component counts.

    How many components a layer has may depend on the weight that it was initialised from, and a model that is only
    evaluated was never prepared. Call it before optimizers are made.

    Args:
        model: Changed in place.
        state: State dict that will be loaded.
        align: Tile of a layer that is structured here, by its name and the dense module.

    Returns:
        Names of the layers that were changed.
    """
    separate(model, [f"{key[:-2]}.weight" if key.endswith(".U") else key for key in state])
    modules = dict(model.named_modules())
    changed = []
    for key, u in state.items():
        name = key[: -len(".U")]
        if not key.endswith(".U") or f"{name}.widths" not in state or name not in modules:
            continue
        module = modules[name]
        num, rows = u.shape
        if isinstance(module, GBLRLayer):
            if module.U.shape == u.shape or module.U.shape[1] != rows:
                continue  # fits, or is an error that loading will report
            for parameter, size in (
                ("U", (num, rows)),
                ("V", (num, module.V.shape[1])),
                ("widths", (2, num)),
                ("locations", (2, num)),
            ):
                old: nn.Parameter = getattr(module, parameter)
                setattr(module, parameter, nn.Parameter(old.new_zeros(size), requires_grad=old.requires_grad))
        elif structurable(module):
            weight = weight_matrix(module)
            if weight.shape[0] % rows:
                continue
            empty = _empty_structure((weight.shape[0], weight.shape[1]), num, rows, weight)
            replace_modules(model, {id(module): structured_like(module, empty, align=align(name, module))})
        else:
            continue
        changed.append(name)
    return changed
