"""Configuration objects for ``torchao.quantization.quantize_``: prepare and convert as torchao's QAT does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .conversion import TOO_SMALL, LayerSettings, frozen_like, structured_from
from .decomposition import METHODS, decompose
from .errors import ConfigError
from .layers import GBLRLayer
from .quiet import quiet_import
from .starts import INITIALISERS
from .swap import can_gain, check_structurable, hooks_of, structurable, weight_matrix
from .tensor import FACTOR_DTYPES, GBLRTensor

with quiet_import("gblr_plugin.GBLRConfig", "torchao 0.18"):
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler

__all__ = ["GBLRConfig"]


@dataclass
class GBLRConfig(AOBaseConfig):
    """Structure the layers that ``quantize_(model, config, filter_fn)`` selects.

    ``step="prepare"`` turns dense layers into trainable structured ones. ``step="convert"`` freezes prepared
    layers, and compresses layers that were never prepared in one shot to ``budget``. Converted layers are left
    alone, so applying a config twice is harmless. The default filter of ``quantize_`` selects linear layers only;
    pass ``filter_fn`` for convolutions. Layers that are too small to gain stay dense; :func:`gblr_plugin.report`
    says so. ``quantize_`` shows a handler one layer at a time: leave layers out whose weight is tied to another's.

    Args:
        step: ``"prepare"`` or ``"convert"``.
        budget: Relative FLOPs in (0, 1]: the target of one-shot compression, and the start of initialisers that take
            one.
        align: Tile of rows and columns to which intervals snap.
        initialiser: How trainable layers start, see :class:`~gblr_plugin.conversion.LayerSettings`.
        method: One-shot decomposition, see :func:`gblr_plugin.decompose`.
        num_components: K of trainable layers; default min(m, n).
        row_splits: Number of matrices packed along the rows.
        plan: How kernels are chosen, see :meth:`GBLRTensor.from_structured`.
        seed: Of random initialisers and decompositions.
        factor_dtype: ``None`` keeps that of the weight; ``"int8"`` converts to int8 factors with a scale per component
            (weight-only). ``quantize_(model, Int8WeightOnlyConfig())`` does the same to a converted model.

    Example:
        >>> from torchao.quantization import quantize_
        >>> quantize_(model, GBLRConfig(step="convert", budget=0.5))  # doctest: +SKIP
    """

    step: Literal["prepare", "convert"] = "prepare"
    budget: float | None = None
    align: int | tuple[int, int] = 1
    initialiser: str = "svd"
    method: str = "gblr"
    num_components: int | None = None
    row_splits: int = 1
    plan: Any = None
    seed: int = 0
    factor_dtype: Literal["int8"] | None = None

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


@register_quantize_module_handler(GBLRConfig)
def _gblr_transform(module: nn.Module, config: GBLRConfig) -> nn.Module:
    """Handler of quantize_: the module itself, turned into what it becomes.

    quantize_ would put another module in one of its places only; one that is used twice is to stay one.
    """
    new = _transformed(module, config)
    if new is not module:
        own = {**vars(new), **hooks_of(module)}
        module.__class__ = new.__class__
        vars(module).clear()
        vars(module).update(own)
    return module


def _transformed(module: nn.Module, config: GBLRConfig) -> nn.Module:
    if isinstance(module, GBLRLayer):
        return module if config.step == "prepare" else _frozen(module, config)
    # Converted layers, and kinds that cannot be structured, are not ours to touch; quantize_ selects subclasses too.
    if not structurable(module) or isinstance(module.weight, GBLRTensor) or hasattr(module, "structure_name"):
        return module
    check_structurable(module, type(module).__name__)
    if not can_gain(module, config.row_splits):
        module.gblr_note = TOO_SMALL  # type: ignore[assignment]  # a plain attribute, shown by the report
        return module
    if config.step == "prepare":
        setting = LayerSettings(
            config.initialiser, config.num_components, config.row_splits, config.align, config.budget, config.seed
        )
        return structured_from(type(module).__name__, module, setting)
    if config.budget is None:
        raise ConfigError("GBLRConfig: converting a layer that was not prepared needs a budget")
    matrix = decompose(
        weight_matrix(module),
        config.budget,
        method=config.method,
        align=config.align,
        row_splits=config.row_splits,
        seed=config.seed,
    )
    return frozen_like(module, matrix, plan=config.plan, factor_dtype=config.factor_dtype)


def _frozen(layer: GBLRLayer, config: GBLRConfig) -> nn.Module:
    if not layer.hard:
        raise ConfigError(
            f"GBLRConfig: masks are still smooth (sigma {layer.sigma:g}); finish training or call "
            "freeze_structure() before converting"
        )
    return frozen_like(layer, layer.structure(), plan=config.plan, factor_dtype=config.factor_dtype)
