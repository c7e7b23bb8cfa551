"""Replaces a model's dense layers by structured ones, and structured layers by frozen modules after the training.

:func:`prepare` chooses layers by patterns and gives all the same settings; :func:`prepare_layers` takes settings by
name. Both do the same for GBLR and for every other family, and so does :func:`convert`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ..calibration.allocation import allocate
from ..calibration.batches import Calibration
from ..calibration.sequential import fit_layers
from ..errors import ConfigError
from ..families.registry import get
from ..layers import StructuredLayer
from ..layers.dense import can_gain, check_structurable, replace_modules, weight_matrix
from ..layers.full import as_full
from ..layers.separation import separated
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..tensor.frozen import use_kept_matrix
from ..utils.progress import track
from .layer_settings import FamilySettings, LayerSettings, structured_from
from .row_splits import RowSplits, row_splits_of
from .selection import Pattern, log_skipped, select_layers
from .ties import check_untied

__all__ = ["convert", "frozen_layer", "frozen_like", "prepare", "prepare_layers", "split_by_family"]

L = TypeVar("L", bound=nn.Module)

_logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    settings: LayerSettings | None = None,
    *,
    family: str | None = None,
    budget: float | None = None,
    row_splits: RowSplits | None = None,
    calibration: Calibration | None = None,
    allocation: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Replace the selected dense layers of a model by trainable structured ones, in place.

    Without ``family`` they are GBLR layers whose structure is learned, by a :class:`~gblr_plugin.StructureLearner` or
    by NNI. With it, their structure is fixed by a projection onto the family at ``budget``, and any training loop
    trains their factors.

    Layers that are asked for and stay dense are logged with the reason: tied weights, output heads, and layers that
    cannot be structured (see :func:`~gblr_plugin.surgery.selection.select_layers`).

    Args:
        model: Changed in place.
        include: Full names, glob patterns, or types and their names; ``None`` for every layer that can gain. An output
            head is structured if it is given by its full name.
        exclude: Names, patterns or types of layers that are not replaced.
        settings: Of GBLR layers that learn their structure, one for all; default :class:`~gblr_plugin.LayerSettings`.
        family: Name of a family, see :func:`~gblr_plugin.families.names`; ``"gblr"`` too.
        budget: Of the family: relative FLOPs of all layers together.
        row_splits: Matrices that layers pack in their rows (query, key, value: 3), for all layers or by pattern, or
            their numbers of rows, or ``"auto"``; see
            :func:`~gblr_plugin.surgery.row_splits.row_splits_of`. Default: as the settings say, else 1.
        calibration: Training batches: layers that start at a budget are fitted to their outputs, with corrected
            biases, see :func:`~gblr_plugin.calibration.sequential.fit_layers`.
        allocation: Rule by which the budget is split over the layers, see
            :func:`~gblr_plugin.calibration.allocation.allocate`. By default all get the same, except in a family that
            has a rule of its own (alds).
        options: The family's own, see its class.

    Returns:
        The new layers by name: of GBLR as a :class:`~gblr_plugin.StructureLearner` takes them.

    Raises:
        ConfigError: If arguments contradict each other, or as :func:`prepare_layers` and
            :func:`~gblr_plugin.surgery.selection.select_layers` raise it.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> list(prepare(model, ["0"], family="monarch", budget=0.5))
        ['0']
    """
    setting = _setting(settings, family, budget, options)
    with separated(model):
        selection = select_layers(model, include, exclude)
        log_skipped(selection.skipped)
        splits = row_splits_of(model, selection.layers, setting.row_splits if row_splits is None else row_splits)
        each = {name: replace(setting, row_splits=count) for name, count in splits.items()}
        return _prepare(model, selection.layers, each, setting, calibration, allocation)


def _prepare(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    each: Mapping[str, LayerSettings | FamilySettings],
    setting: LayerSettings | FamilySettings,
    calibration: Calibration | None,
    allocation: str | None,
) -> dict[str, Any]:
    """Replace layers, with the budget of their common setting split over them by a rule."""
    if allocation not in (None, "uniform"):
        if setting.budget is None:
            raise ConfigError("allocation: it splits a starting budget: give LayerSettings(budget=...)")
        gaining = {name: module for name, module in layers.items() if can_gain(module, each[name].row_splits)}
        splits = {name: each[name].row_splits for name in gaining}
        shares = allocate(model, gaining, setting.budget, allocation, calibration=calibration, row_splits=splits)
        each = {**each, **{name: replace(each[name], budget=share) for name, share in shares.items()}}
    elif isinstance(setting, FamilySettings) and allocation is None:
        splits = {name: settings.row_splits for name, settings in each.items()}
        return prepare_layers(model, split_by_family(layers, setting, splits), calibration=calibration)
    return prepare_layers(model, each, calibration=calibration)


def split_by_family(
    layers: Mapping[str, nn.Module], setting: FamilySettings, row_splits: Mapping[str, int] | None = None
) -> dict[str, FamilySettings]:
    """Split a budget that layers share by the family's own rule.

    Args:
        layers: Dense layers by name.
        setting: Of all of them; its budget is that of all together.
        row_splits: Number of matrices packed along the rows, by layer name; default as the setting says.

    Returns:
        Settings by name, as :func:`prepare_layers` takes them.
    """
    each = {name: replace(setting, row_splits=(row_splits or {}).get(name, setting.row_splits)) for name in layers}
    splits = {name: each[name].row_splits for name, module in layers.items() if can_gain(module, each[name].row_splits)}
    weights = {name: weight_matrix(layers[name]) for name in splits}
    shares = get(setting.family).budgets(weights, setting.budget, row_splits=splits, **setting.options)
    return each | {name: replace(each[name], budget=share) for name, share in shares.items()}


def _setting(
    settings: LayerSettings | None, family: str | None, budget: float | None, options: dict[str, Any]
) -> LayerSettings | FamilySettings:
    """Read the arguments of :func:`prepare` as settings for every layer."""
    if family is None:
        if budget is not None or options:
            given = "budget" if budget is not None else next(iter(options))
            raise ConfigError(f"prepare: {given} is for a family; give family=, or LayerSettings in its place")
        return settings or LayerSettings()
    get(family)
    if settings is not None:
        raise ConfigError("prepare: settings are of GBLR layers that learn their structure; leave them or family out")
    if budget is None:
        raise ConfigError(f"prepare: family {family!r} needs a budget, relative FLOPs in (0, 1]")
    return FamilySettings(family, budget, options=options)


def prepare_layers(
    model: nn.Module,
    settings: Mapping[str, LayerSettings | FamilySettings],
    *,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Replace named dense layers by trainable structured ones, in place.

    Everything is checked and computed before the model is touched. A layer that cannot be cheaper than dense stays
    dense, with a warning, and is listed by :func:`gblr_plugin.report`.

    Args:
        model: Changed in place.
        settings: Settings by module name.
        calibration: Batches: layers that start at a budget are fitted to their outputs, with corrected biases, see
            :func:`~gblr_plugin.calibration.sequential.fit_layers`.

    Returns:
        The new layers by name, without those that stay dense. A shared module has one entry.

    Raises:
        ConfigError: If a name is unknown, a layer cannot be structured, its weight is tied or has NaN entries, a
            setting cannot be used, or none of the layers can gain.
    """
    chosen = _modules(model, settings)
    check_untied(model, chosen)
    small = {name: module for name, module in chosen.items() if not can_gain(module, settings[name].row_splits)}
    if chosen and len(small) == len(chosen):
        name, module = next(iter(small.items()))
        shape = tuple(weight_matrix(module).shape)
        raise ConfigError(f"layer {name!r}: a {shape[0]} x {shape[1]} weight is too small to gain from structure")
    gaining = {name: module for name, module in chosen.items() if name not in small}
    made: dict[str, nn.Module] = {}
    if calibration is not None:

        def fit(name: str, target: Tensor, metric: Metric) -> Any:
            return structured_from(chosen[name], settings[name], target, metric)

        fitted = {name: module for name, module in gaining.items() if settings[name].budget is not None}
        for name, (layer, bias) in fit_layers(model, fitted, calibration, fit).items() if fitted else ():
            made[name] = _with_bias(layer, bias)
    for name in track([name for name in gaining if name not in made], "decomposing"):
        try:
            made[name] = structured_from(chosen[name], settings[name])
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}: {error}") from error
    for name in small:
        _logger.warning("layer %r is too small to gain from structure and stays dense", name)
    layers = {name: made[name] for name in gaining}
    replace_modules(model, {id(chosen[name]): layer for name, layer in layers.items()})
    return layers


def _modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Look up the named dense layers; a module that is named twice is returned under its first name.

    Raises:
        ConfigError: If a name is unknown, or a layer cannot be structured.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            raise ConfigError(f"layers: no module named {name!r} in the model")
        if not name:
            raise ConfigError("layers: the model itself cannot be replaced; put it into an nn.Sequential")
        check_structurable(modules[name], name)
        if all(modules[name] is not module for module in chosen.values()):
            chosen[name] = modules[name]
    return chosen


def _with_bias(layer: L, bias: Tensor | None) -> L:
    """Write a corrected bias, if there is one, into a layer, and return the layer."""
    if bias is not None:
        layer.bias.data.copy_(bias)  # type: ignore[operator]  # a parameter where the dense layer had one
    return layer


def frozen_like(
    module: nn.Module, matrix: StructuredMatrix, *, plan: Any = None, factor_dtype: str | None = None
) -> nn.Module:
    """Make a plain nn.Linear, nn.Conv1d or nn.Conv2d whose weight is a frozen :class:`~gblr_plugin.GBLRTensor`.

    For a small weight that keeps its dense matrix beside the factors, the module is of a subclass that multiplies by
    this matrix (``frozen.py``). A matrix that costs at least as much as the dense product becomes a dense weight.

    Args:
        module: The dense or structured module whose geometry, bias and mode are taken over.
        matrix: Its (m, n) weight.
        plan: Passed to :meth:`GBLRTensor.from_structured`.
        factor_dtype: The same.

    Returns:
        The frozen module; its bias still trains if it did.
    """
    from ..tensor.gblr_tensor import GBLRTensor  # needs torchao, which the trainable path does not

    if not isinstance(module, StructuredLayer):  # a decomposition is in float32 where the weight is in half precision
        like: Any = module.weight
        matrix = matrix.to(device=like.device, dtype=like.dtype)
    shape: tuple[int, ...] = matrix.shape
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        shape = (matrix.shape[0], module.in_channels, *module.kernel_size)
    full = matrix.relative_flops >= 1.0
    weight = (
        matrix.to_dense().reshape(shape)
        if full
        else GBLRTensor.from_structured(matrix, shape=shape, plan=plan, factor_dtype=factor_dtype)
    )
    new: nn.Module
    bias: Any = module.bias
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        kind: Any = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
        geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        channels = module.in_channels, module.out_channels
        new = kind(*channels, module.kernel_size, **geometry, bias=bias is not None, device="meta")
    else:
        new = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    new.train(module.training)
    return as_full(new) if full else use_kept_matrix(new)


def frozen_layer(
    layer: StructuredLayer, matrix: StructuredMatrix | None, *, plan: Any = None, factor_dtype: str | None = None
) -> nn.Module:
    """Freeze a trained structured layer.

    Args:
        layer: The layer.
        matrix: What its ``frozen_structure`` returns.
        plan: As :func:`frozen_like` takes it.
        factor_dtype: The same.

    Returns:
        What :func:`frozen_like` makes of the matrix; without one, the layer itself, whose factors no longer train.
    """
    if matrix is None:
        layer.freeze_factors()
        return layer
    return frozen_like(layer, matrix, plan=plan, factor_dtype=factor_dtype)


def convert(model: nn.Module, *, plan: Any = None, factor_dtype: str | None = None) -> nn.Module:
    """Replace the trainable structured layers of a model by frozen modules, in place.

    A layer whose matrix is a GBLR matrix of equal cost becomes a plain module with a frozen
    :class:`~gblr_plugin.GBLRTensor`, so that all families run on the same kernels. The others keep their own product,
    with factors that no longer train.

    Args:
        model: A model with structured layers; changed in place (or replaced, if it is such a layer itself).
        plan: How kernels are chosen, see :class:`~gblr_plugin.GBLRTensor`.
        factor_dtype: ``"int8"``: the factors of frozen weights are rounded to 8 bits.

    Returns:
        The model. Its outputs are those of the structured layers with exact boxcar masks.

    Raises:
        ConfigError: If a layer's masks are still smooth: converting it would change the network; freeze it first.
    """
    matrices: dict[StructuredLayer, StructuredMatrix | None] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, StructuredLayer):
            try:
                matrices[layer] = layer.frozen_structure()
            except ConfigError as error:
                raise ConfigError(f"layer {name or type(layer).__name__!r}: {error}") from error
    frozen = {
        id(layer): frozen_layer(layer, matrix, plan=plan, factor_dtype=factor_dtype)
        for layer, matrix in matrices.items()
    }
    return replace_modules(model, frozen)
