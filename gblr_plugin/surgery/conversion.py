"""Prepare a model for structure learning, and convert it to frozen structured weights when it is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ..calibration.allocation import allocate
from ..calibration.batches import Calibration
from ..calibration.sequential import fit_layers
from ..decomposition.anchor import anchored
from ..errors import ConfigError
from ..layers import GBLRLayer
from ..layers.dense import can_gain, check_structurable, replace_modules, structured_like, weight_matrix
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..tensor.frozen import hasten
from ..utils.progress import track
from .recompression import recompressed
from .selection import Pattern, log_skipped, select_layers
from .starts import LEARNED_RANK, start
from .ties import check_untied

__all__ = ["LayerSettings", "convert", "frozen_like", "prepare", "prepare_layers", "with_bias"]

TOO_SMALL = "too small to gain, kept dense"
"""Note of a layer that was asked to be structured and stays dense, as the report shows it."""

L = TypeVar("L", bound=nn.Module)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSettings:
    """How a dense layer is turned into a trainable structured one.

    Args:
        initialiser: ``"svd"`` (full widths, as published), ``"trapezoid"``, ``"random"``, or at ``budget`` a
            decomposition (``"pursuit"``, ``"gblr"``) or a family that GBLR contains (``"block_low_rank"``,
            ``"block_sparse"``, ``"block_diagonal"``); ``"learned_rank"``: components of a full SVD that are learned to
            be on or off as a whole, with no other settings.
        num_components: K per split; default min(m / s, n).
        row_splits: Number of matrices packed along the rows (packed query, key, value: 3).
        align: Tile of rows and columns to which intervals snap; an integer or a pair.
        budget: Relative FLOPs to start at, for initialisers that take one.
        seed: Of random initialisers.
    """

    initialiser: str = "svd"
    num_components: int | None = None
    row_splits: int = 1
    align: int | tuple[int, int] = 1
    budget: float | None = None
    seed: int = 0


def prepare_layers(
    model: nn.Module, settings: Mapping[str, LayerSettings], *, calibration: Calibration | None = None
) -> dict[str, GBLRLayer]:
    """Swap named dense layers for trainable structured ones, in place.

    Everything is checked and computed before the model is touched. A layer that cannot be cheaper than dense stays
    dense, with a warning and a note that :func:`gblr_plugin.report` shows.

    Args:
        model: Changed in place.
        settings: Settings by module name.
        calibration: Batches: starts at a budget are then fitted to the layers' outputs, with corrected biases, see
            :func:`~gblr_plugin.calibration.sequential.fit_layers`.

    Returns:
        The new layers by name, without those that stay dense. A shared module has one entry.

    Raises:
        ConfigError: If a name is unknown, a layer cannot be structured, its weight is tied or has NaN entries, or none
            of the layers can gain.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in settings if name not in modules]
    if unknown:
        raise ConfigError(f"layers: no module named {unknown[0]!r} in the model")
    if "" in settings:
        raise ConfigError("layers: the model itself cannot be replaced; put it into an nn.Sequential")
    chosen: dict[str, nn.Module] = {}
    for name in settings:
        check_structurable(modules[name], name)
        if all(modules[name] is not module for module in chosen.values()):
            chosen[name] = modules[name]
    check_untied(model, chosen)
    kept = {name: module for name, module in chosen.items() if not can_gain(module, settings[name].row_splits)}
    if chosen and len(kept) == len(chosen):
        name, module = next(iter(kept.items()))
        shape = tuple(weight_matrix(module).shape)
        raise ConfigError(f"layer {name!r}: a {shape[0]} x {shape[1]} weight is too small to gain from structure")
    fitted = {
        name: module
        for name, module in chosen.items()
        if name not in kept and settings[name].budget is not None and settings[name].initialiser != LEARNED_RANK
    }
    layers: dict[str, GBLRLayer] = {}
    if calibration is not None and fitted:

        def fit(name: str, target: Tensor, metric: Metric) -> GBLRLayer:
            return structured_from(name, chosen[name], settings[name], target, metric)

        for name, (layer, bias) in fit_layers(model, fitted, calibration, fit).items():
            layers[name] = with_bias(layer, bias)
    for name in track([name for name in chosen if name not in kept and name not in layers], "decomposing"):
        layers[name] = structured_from(name, chosen[name], settings[name])
    layers = {name: layers[name] for name in chosen if name not in kept}
    for name, module in kept.items():
        module.gblr_note = TOO_SMALL  # type: ignore[assignment]  # a plain attribute
        _logger.warning("layer %r is too small to gain from structure and stays dense", name)
    replace_modules(model, {id(chosen[name]): layer for name, layer in layers.items()})
    return layers


def with_bias(layer: L, bias: Tensor | None) -> L:
    """The layer, with the values of its bias replaced unless there are none."""
    if bias is not None:
        layer.bias.data.copy_(bias)  # type: ignore[operator]  # a parameter where the dense layer had one
    return layer


def structured_from(
    name: str, module: nn.Module, setting: LayerSettings, target: Tensor | None = None, metric: Metric | None = None
) -> GBLRLayer:
    """The trainable layer that starts from a dense one.

    Args:
        name: For messages.
        module: The dense layer.
        setting: Its start.
        target: (m, n) matrix to approximate in place of the layer's weight.
        metric: Norm in which to approximate; default the Frobenius norm.

    Raises:
        ConfigError: If the layer or a setting cannot be used.
    """
    try:
        if setting.initialiser == LEARNED_RANK:
            return _learned_rank(module, setting)
        matrix = start(weight_matrix(module) if target is None else target, setting, metric)
        tiles = setting.align if isinstance(setting.align, tuple) else (setting.align, setting.align)
        layer = structured_like(module, anchored(matrix, tiles), align=setting.align)
        layer.free_gauge()
        return layer
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("layer ") else f"layer {name!r}: {message}") from error


def _learned_rank(module: nn.Module, setting: LayerSettings) -> GBLRLayer:
    from ..families.learned_rank import learned_rank_like  # families convert

    own = {"num_components": (None,), "row_splits": (1,), "align": (1, (1, 1))}
    changed = next((name for name, plain in own.items() if getattr(setting, name) not in plain), None)
    if changed is not None:
        raise ConfigError(f"{LEARNED_RANK} begins at the full SVD, on whole axes: leave {changed} out")
    return learned_rank_like(module)


def prepare(
    model: nn.Module,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    settings: LayerSettings | None = None,
    *,
    calibration: Calibration | None = None,
    allocation: str = "uniform",
) -> dict[str, GBLRLayer]:
    """Swap the selected dense layers of a model for trainable structured ones, in place.

    What is asked for and stays dense is logged with the reason: tied weights, output heads, and what cannot be
    structured (see :func:`~gblr_plugin.surgery.selection.select_layers`).

    Args:
        model: Changed in place.
        include: Full names, glob patterns, or types and their names; ``None`` for every layer that can gain. An output
            head is structured if it is given by its full name.
        exclude: Taken away again.
        settings: One for all layers; default :class:`LayerSettings`.
        calibration: Training batches; starts at a budget are then fitted to the layers' outputs.
        allocation: How the budget of the settings is split over the layers, see
            :func:`~gblr_plugin.calibration.allocation.allocate`; by default all start at the same.

    Returns:
        The new layers by name, as a :class:`~gblr_plugin.StructureLearner` takes them.

    Raises:
        ConfigError: See :func:`prepare_layers` and :func:`~gblr_plugin.surgery.selection.select_layers`.
    """
    selection = select_layers(model, include, exclude)
    log_skipped(selection.skipped)
    chosen = selection.layers
    setting = settings or LayerSettings()
    each = dict.fromkeys(chosen, setting)
    if allocation != "uniform":
        if setting.budget is None:
            raise ConfigError("allocation: it splits a starting budget: give LayerSettings(budget=...)")
        gaining = {name: module for name, module in chosen.items() if can_gain(module, setting.row_splits)}
        splits = dict.fromkeys(gaining, setting.row_splits)
        shares = allocate(model, gaining, setting.budget, allocation, calibration=calibration, row_splits=splits)
        each |= {name: replace(setting, budget=share) for name, share in shares.items()}
    return prepare_layers(model, each, calibration=calibration)


def frozen_like(
    module: nn.Module, matrix: StructuredMatrix, *, plan: Any = None, factor_dtype: str | None = None
) -> nn.Module:
    """A plain nn.Linear / nn.Conv1d / nn.Conv2d whose weight is a frozen :class:`~gblr_plugin.GBLRTensor`.

    Where a small weight keeps its matrix beside the factors, the module is of a subclass that takes it first
    (``frozen.py``). A matrix that costs at least as much as the dense product becomes a dense weight instead; crowded
    boxes of it become dense blocks (``recompressed`` in ``recompression.py``).

    Args:
        module: The dense or structured module whose geometry, bias and mode are taken over.
        matrix: Its (m, n) weight.
        plan: Passed to :meth:`GBLRTensor.from_structured`.
        factor_dtype: The same.

    Returns:
        The frozen module; its bias still trains if it did.
    """
    from ..tensor.gblr_tensor import GBLRTensor  # needs torchao, which the trainable path does not

    if not isinstance(module, GBLRLayer):  # a decomposition is in float32 where the weight is in half precision
        like: Any = module.weight
        matrix = matrix.to(device=like.device, dtype=like.dtype)
    matrix = recompressed(matrix)
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
        new = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=bias is not None,
            padding_mode=module.padding_mode,
            device="meta",
        )
    else:
        new = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    if full:  # plain attributes, shown by the report
        new.structure_name, new.gblr_note = "full", "not cheaper than dense, stored dense"  # type: ignore[assignment]  # attributes
    new.train(module.training)
    return hasten(new)


def convert(model: nn.Module, *, plan: Any = None) -> nn.Module:
    """Replace every trainable structured layer by a plain module with a frozen structured weight, in place.

    Args:
        model: A model with structured layers; changed in place (or replaced, if it is such a layer itself).
        plan: How kernels are chosen, see :class:`~gblr_plugin.GBLRTensor`.

    Returns:
        The model. Its outputs are those of the structured layers with exact boxcar masks.

    Raises:
        ConfigError: If a layer's masks are still smooth: converting it would change the network; freeze it first.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GBLRLayer)}
    for name, layer in layers.items():
        if not layer.hard:
            raise ConfigError(
                f"layer {name or type(layer).__name__!r}: its masks are still smooth (sigma {layer.sigma:g}); finish "
                "training or call freeze_structure() before converting"
            )
    frozen = {id(layer): frozen_like(layer, layer.structure(), plan=plan) for layer in layers.values()}
    return replace_modules(model, frozen)
