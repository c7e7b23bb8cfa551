"""Configuration objects for ``torchao.quantization.quantize_``: prepare and convert as torchao's QAT does it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from .. import families
from ..decomposition import METHODS, decompose
from ..errors import ConfigError
from ..kernels.plan import Plan
from ..layers import StructuredLayer
from ..layers.attention import PROJECTIONS, ProjectedAttention
from ..layers.dense import can_gain, check_structurable, hooks_of, obstacle, weight_matrix
from ..layers.separation import is_packed, separated
from ..surgery.conversion import frozen_layer, frozen_like
from ..surgery.layer_settings import INITIALISERS, FamilySettings, LayerSettings, structured_from
from ..surgery.matrices import weight_matrices
from ..surgery.selection import LayerFilter, Skipped, choose, log_skipped
from ..tensor.gblr_tensor import FACTOR_DTYPES
from ._compat import AOBaseConfig, FqnToConfig, default_filter, quantize_call, register_quantize_module_handler

__all__ = ["GBLRConfig"]


@dataclass
class GBLRConfig(AOBaseConfig):
    """Structure the layers that ``quantize_(model, config, filter_fn)`` selects.

    ``step="prepare"`` turns dense layers into trainable structured ones. ``step="convert"`` freezes prepared
    layers, and compresses layers that were never prepared in one shot to ``budget``. Converted layers are left
    alone, so applying a config twice is harmless. The default filter of ``quantize_`` selects linear layers only;
    :func:`gblr_plugin.layer_filter` makes one that takes every layer that can gain, or names, patterns and types.
    Tied weights, output heads and layers that are too small to gain stay dense; they are logged, and
    :func:`gblr_plugin.report` lists them. An output head is structured where ``layer_filter`` or torchao's
    ``FqnToConfig`` gives its full name, or that of its weight. torchao's ``config_to_dict`` and ``config_from_dict``
    write and read a config, plans included.

    Args:
        step: ``"prepare"`` or ``"convert"``.
        budget: Relative FLOPs in (0, 1]: the target of one-shot compression, and the start of initialisers that take
            one.
        align: Tile of rows and columns to which intervals snap: a number, or a pair, which is kept as a list as JSON
            has it.
        initialiser: How trainable layers start, see :class:`~gblr_plugin.LayerSettings`.
        method: One-shot decomposition, see :func:`gblr_plugin.decompose`.
        num_components: K of trainable layers; default min(m, n).
        row_splits: Number of matrices packed along the rows.
        plan: How kernels are chosen, see :meth:`GBLRTensor.from_structured`; a :class:`~gblr_plugin.kernels.plan.Plan`
            is kept as its dictionary.
        seed: Seed of random initialisers and decompositions.
        factor_dtype: ``None`` keeps that of the weight; ``"int8"`` converts to int8 factors with a scale per component
            (weight-only). ``quantize_(model, Int8WeightOnlyConfig())`` does the same to a converted model.
        family: Name of a structure family whose layers take the place of the dense ones, at ``budget`` and with
            ``row_splits``; their structure is fixed, see :func:`gblr_plugin.prepare`. ``None``: GBLR as all else here
            says.
        options: The family's own.

    Example:
        >>> from torchao.quantization import quantize_
        >>> quantize_(model, GBLRConfig(step="convert", budget=0.5))  # doctest: +SKIP
    """

    step: Literal["prepare", "convert"] = "prepare"
    budget: float | None = None
    align: int | Sequence[int] = 1
    initialiser: str = "svd"
    method: str = "gblr"
    num_components: int | None = None
    row_splits: int = 1
    plan: Any = None
    seed: int = 0
    factor_dtype: Literal["int8"] | None = None
    family: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise ConfigError(f"GBLRConfig: step must be 'prepare' or 'convert', got {self.step!r}")
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and 0 < self.budget <= 1):
            raise ConfigError(f"GBLRConfig: budget must be relative FLOPs in (0, 1], got {self.budget!r}")
        if self.factor_dtype not in FACTOR_DTYPES:
            raise ConfigError(f"GBLRConfig: factor_dtype must be None or 'int8', got {self.factor_dtype!r}")
        for name, known in (("method", METHODS), ("initialiser", INITIALISERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"GBLRConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.family is None and self.options:
            raise ConfigError("GBLRConfig: options are those of a family; give its name too")
        if self.family is not None:
            families.get(self.family)
            if self.budget is None:
                raise ConfigError(f"GBLRConfig: family {self.family!r} needs a budget")
        # torchao writes configs as JSON, and refuses tuples.
        if isinstance(self.align, tuple):
            self.align = list(self.align)
        if isinstance(self.plan, dict):
            Plan.from_dict(self.plan)
        elif isinstance(self.plan, Plan):
            self.plan = json.loads(json.dumps(self.plan.to_dict()))

    @property
    def _tile(self) -> int | tuple[int, int]:
        """What ``align`` says, in the form that the layers take."""
        return tuple(self.align) if isinstance(self.align, list) else self.align  # type: ignore[return-value]  # checked there

    @property
    def _plan(self) -> Any:
        """What ``plan`` says, in the form that tensors take."""
        return Plan.from_dict(self.plan) if isinstance(self.plan, dict) else self.plan


@register_quantize_module_handler(GBLRConfig)
def _gblr_transform(module: nn.Module, config: GBLRConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Handler of quantize_: it changes the module in place, and returns it.

    quantize_ would put another module in one place only, where the model uses the module in two. FqnToConfig names a
    parameter, and its patterns match biases too: of a dense layer only the weight is structured.
    """
    if parameter_name != "weight" and not isinstance(module, StructuredLayer):
        return module
    if is_packed(module):
        return _become(module, _projections(module, config))
    if not isinstance(module, StructuredLayer) and _stays_dense(module):
        return module
    return _become(module, _transformed(module, config))


def _projections(attention: Any, config: GBLRConfig) -> nn.Module:
    """Attention with layers of those of its projections that the filter of quantize_ chose, and can gain."""
    passes = quantize_call().get("filter_fn")
    names = passes.projections(attention) if isinstance(passes, LayerFilter) else PROJECTIONS
    separate = ProjectedAttention(attention)
    made = {name: _transformed(getattr(separate, name), config) for name in names}
    if all(made[name] is getattr(separate, name) for name in names):
        return attention  # type: ignore[no-any-return]  # a module
    for name, layer in made.items():
        setattr(separate, name, layer)
    return separate


def _become(module: nn.Module, new: nn.Module) -> nn.Module:
    """Turn a module into another one, in place; returns it."""
    if new is not module:
        attributes = {**vars(new), **hooks_of(module)}
        module.__class__ = new.__class__
        vars(module).clear()
        vars(module).update(attributes)
    return module


def _stays_dense(module: nn.Module) -> bool:
    """Whether the policy of ``selection.py`` leaves a dense layer as it is. What it leaves in a model is logged once.

    Raises:
        ConfigError: If FqnToConfig gives the layer's full name, and it is tied or cannot be structured.
    """
    call = quantize_call()
    model, given, passes = call.get("model", module), call.get("config"), call.get("filter_fn")
    name = next((name for name, other in model.named_modules() if other is module), "")
    if not name or isinstance(passes, LayerFilter):  # the layer alone was given, or the policy is applied already
        return obstacle(module) is not None
    keys = given.fqn_to_config if isinstance(given, FqnToConfig) else {}
    named = [name] if name in keys or f"{name}.weight" in keys else []
    selection = choose(model, lambda _, other: other is module, named)
    if passes is None:
        log_skipped(selection.skipped)
    elif module is next(other for fqn, other in model.named_modules() if passes(other, fqn)):
        log_skipped(_left_dense(model, passes))
    return not selection.layers


def _left_dense(model: nn.Module, passes: Any) -> list[Skipped]:
    """What quantize_ leaves dense: with torchao's default filter, or of what the caller's filter passes."""
    with separated(model):
        everything = choose(model, lambda name, module: True, default=True)
        entries = {matrix.name: matrix.entries for matrix in weight_matrices(model)}
    modules = dict(model.named_modules())
    if passes is not default_filter:
        return [skip for skip in everything.skipped if skip.name in modules and passes(modules[skip.name], skip.name)]
    reason = "the default filter of quantize_ takes linear layers only; give filter_fn=gblr_plugin.layer_filter(model)"
    others = [
        name
        for name, module in everything.layers.items()
        if not passes(module) or is_packed(modules[name.rpartition(".")[0]])
    ]
    return everything.skipped + [Skipped(name, reason, entries[name] / sum(entries.values())) for name in others]


def _transformed(module: nn.Module, config: GBLRConfig) -> nn.Module:
    if isinstance(module, StructuredLayer):
        return module if config.step == "prepare" else _frozen(module, config)
    check_structurable(module, type(module).__name__)
    if not can_gain(module, config.row_splits):
        return module
    if config.family is not None:
        settings = FamilySettings(config.family, float(config.budget or 0), config.row_splits, config.options)
        layer = structured_from(module, settings)
        return layer if config.step == "prepare" else _frozen(layer, config)
    if config.step == "prepare":
        setting = LayerSettings(
            config.initialiser, config.num_components, config.row_splits, config._tile, config.budget, config.seed
        )
        return structured_from(module, setting)
    if config.budget is None:
        raise ConfigError("GBLRConfig: converting a layer that was not prepared needs a budget")
    matrix = decompose(
        weight_matrix(module),
        config.budget,
        method=config.method,
        align=config._tile,
        row_splits=config.row_splits,
        seed=config.seed,
    )
    return frozen_like(module, matrix, plan=config._plan, factor_dtype=config.factor_dtype)


def _frozen(layer: StructuredLayer, config: GBLRConfig) -> nn.Module:
    try:
        matrix = layer.frozen_structure()
    except ConfigError as error:
        raise ConfigError(f"GBLRConfig: {error}") from error
    return frozen_layer(layer, matrix, plan=config._plan, factor_dtype=config.factor_dtype)
