"""Give a model the layers of families that a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..families.base import FamilyMatrix
from ..families.layers import FamilyLayer, layer_like
from ..layers.dense import replace_modules, structurable, weight_matrix
from ..serialization.families import family_record, matrix_in_state

__all__ = ["match_families"]


@torch.no_grad()
def match_families(model: nn.Module, state: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Before a state dict is loaded: give layers of families the structure that they had when it was saved.

    Which blocks and ranks a projection chose depends on the weights that it was made from. Call it before optimizers
    are made.

    Args:
        model: Changed in place.
        state: State dict that will be loaded.
        records: What does not train of the layers in it, by name, see
            :func:`~gblr_plugin.serialization.families.family_record`.

    Raises:
        ConfigError: If a record does not fit the model or the state.
    """
    modules = dict(model.named_modules())
    for name, record in records.items():
        module = modules.get(name)
        if isinstance(module, FamilyLayer):
            saved = _saved_matrix(state, name, record, module.matrix_shape)
            if family_record(module.geometry) != record or _shapes(module.geometry) != _shapes(saved):
                module.set_matrix(saved)
        elif module is not None and structurable(module):
            m, n = weight_matrix(module).shape
            replace_modules(model, {id(module): layer_like(module, _saved_matrix(state, name, record, (m, n)))})


def _shapes(matrix: FamilyMatrix) -> dict[str, torch.Size]:
    return {name: factor.shape for name, factor in matrix.factors().items()}


def _saved_matrix(state: Mapping[str, Any], name: str, record: Any, shape: tuple[int, int]) -> FamilyMatrix:
    try:
        return matrix_in_state(state, name, record, shape)
    except ConfigError as error:
        raise ConfigError(f"layer {name!r}: the checkpoint does not fit it: {error}") from error
