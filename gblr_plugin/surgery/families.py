"""Put the layers of a family in a model, and freeze them when they are trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..calibration.allocation import allocate
from ..calibration.batches import Calibration
from ..calibration.sequential import fit_layers
from ..errors import ConfigError
from ..families.base import options_of
from ..families.layers import FamilyLayer
from ..families.registry import get
from ..layers.dense import can_gain, check_structurable, replace_modules, stored_weight, weight_matrix
from ..matrix.metric import Metric
from ..utils.progress import track
from .conversion import convert as convert_gblr
from .conversion import frozen_like, with_bias
from .selection import Pattern, log_skipped, select_layers
from .ties import check_untied

__all__ = ["convert", "replace"]

_logger = logging.getLogger(__name__)


def replace(
    model: nn.Module,
    selection: Iterable[Pattern] | Mapping[str, nn.Module] | None,
    family: str,
    budget: float | Mapping[str, float],
    *,
    calibration: Calibration | None = None,
    allocation: str | None = None,
    **options: Any,
) -> dict[str, nn.Module]:
    """Swap dense layers for trainable layers of a family, in place; every family alike.

    Everything is checked and computed before the model is touched. Layers too small to gain stay dense, with a warning.

    Args:
        model: Changed in place.
        selection: Names, glob patterns or types as :func:`~gblr_plugin.surgery.selection.select_layers` takes them,
            modules by name, or ``None`` for every layer that can gain. What stays dense is logged with the reason.
        family: Name of the family, see :func:`~gblr_plugin.families.names`.
        budget: Relative FLOPs, for all layers together (split as the family allocates; most give each the same), or by
            name.
        calibration: Training batches: the layers are then fitted to their outputs, with corrected biases, see
            :func:`~gblr_plugin.calibration.sequential.fit_layers`.
        allocation: Rule by which one budget is split, see :func:`~gblr_plugin.calibration.allocation.allocate`.
        options: The family's own; ``row_splits`` and gblr's ``align`` for all layers, or by name.

    Returns:
        The new layers by name.

    Raises:
        ConfigError: If a name, budget or option cannot be used, a weight is tied, or no layer can gain.
    """
    kind = get(family)
    if isinstance(selection, Mapping):
        chosen = dict(selection)
    else:
        selected = select_layers(model, selection)
        log_skipped(selected.skipped)
        chosen = dict(selected.layers)
    for name, module in chosen.items():
        check_structurable(module, name)
    check_untied(model, chosen)
    own = {name: options_of(options, name) for name in chosen}
    small = [name for name, module in chosen.items() if not can_gain(module, own[name]["row_splits"])]
    for name in small:
        _logger.warning("layer %r is too small to gain from structure and stays dense", name)
        chosen.pop(name).gblr_note = "too small to gain, kept dense"
    if not chosen:
        raise ConfigError(f"family {family!r}: none of the selected layers is large enough to gain from structure")
    if isinstance(budget, Mapping):
        missing = [name for name in chosen if name not in budget]
        if missing:
            raise ConfigError(f"layer {missing[0]!r}: no budget given for it")
        budgets = dict(budget)
    elif allocation is not None:
        splits = {name: own[name]["row_splits"] for name in chosen}
        budgets = allocate(model, chosen, budget, allocation, calibration=calibration, row_splits=splits)
    else:
        budgets = kind.budgets({name: weight_matrix(module) for name, module in chosen.items()}, budget, **options)
    layers: dict[str, nn.Module] = {}
    if calibration is not None:

        def fit(name: str, target: Tensor, metric: Metric) -> Any:
            return kind.trainable(_standing_in(chosen[name], target), budgets[name], calibration=metric, **own[name])

        fitted = fit_layers(model, chosen, calibration, fit)
        layers = {name: with_bias(*fitted[name]) for name in chosen}
    for name in track([name for name in chosen if name not in layers], "decomposing"):
        try:
            layers[name] = kind.trainable(chosen[name], budgets[name], **own[name])
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}: {error}") from error
    replace_modules(model, {id(chosen[name]): layer for name, layer in layers.items()})
    return layers


def _standing_in(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module with another (m, n) weight; the module itself is left alone."""
    old: Any = module.weight
    stand_in = copy.copy(module)
    parameter = nn.Parameter(stored_weight(module, weight), requires_grad=old.requires_grad)
    stand_in._parameters = {**module._parameters, "weight": parameter}
    return stand_in


def convert(model: nn.Module, *, plan: Any = None) -> nn.Module:
    """Freeze the family layers of a model, in place; GBLR layers are converted as :func:`gblr_plugin.convert` does.

    Layers whose matrix is a GBLR matrix of equal cost become plain modules with a frozen
    :class:`~gblr_plugin.GBLRTensor`, so that all families run on the same kernels; the others keep their own product
    with factors that no longer train.

    Args:
        model: Changed in place (or replaced, if it is such a layer itself).
        plan: How kernels are chosen, see :class:`~gblr_plugin.GBLRTensor`.

    Returns:
        The model; its outputs are unchanged.

    Raises:
        ConfigError: See :func:`gblr_plugin.convert`.
    """
    model = convert_gblr(model, plan=plan)
    replacements: dict[int, nn.Module] = {}
    for layer in model.modules():
        if not isinstance(layer, FamilyLayer):
            continue
        matrix = layer.frozen_matrix()
        structured = matrix.to_structured() if matrix.row_order is None else None
        if structured is not None and structured.stored == matrix.multiply_adds:
            replacements[id(layer)] = frozen_like(layer, structured, plan=plan)
        else:
            layer.freeze()
    return replace_modules(model, replacements)
