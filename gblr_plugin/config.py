"""Configuration objects for ``torchao.quantization.quantize_``: prepare and convert as torchao's QAT does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from .conversion import LayerSettings, _structured, frozen_like
from .decomposition import decompose
from .errors import ConfigError
from .layers import GBLRLayer
from .swap import can_gain, check_structurable, structurable, weight_matrix
from .tensor import GBLRTensor

__all__ = ["GBLRConfig"]


@dataclass
class GBLRConfig(AOBaseConfig):
    """Structure the layers that ``quantize_(model, config, filter_fn)`` selects.

    ``step="prepare"`` turns dense layers into trainable structured ones. ``step="convert"`` freezes prepared layers,
    and compresses layers that were never prepared in one shot to ``budget``. Converted layers are left alone, so
    applying a config twice is harmless. quantize_'s default filter selects linear layers only; pass ``filter_fn`` for
    convolutions.

    Args:
        step: ``"prepare"`` or ``"convert"``.
        budget: Relative FLOPs in (0, 1]: the target of one-shot compression, and the start of initialisers that take
        one. align: Tile of rows and columns to which intervals snap.
        initialiser: How trainable layers start, see :class:`~gblr_plugin.conversion.LayerSettings`.
        method: One-shot decomposition, see :func:`gblr_plugin.decompose`.
        num_components: K of trainable layers; default min(m, n).
        row_splits: Number of matrices packed along the rows.
        plan: How kernels are chosen, see :meth:`GBLRTensor.from_structured`.
        seed: Of random initialisers and decompositions.

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

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise ConfigError(f"GBLRConfig: step must be 'prepare' or 'convert', got {self.step!r}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ConfigError(f"GBLRConfig: budget must be relative FLOPs in (0, 1], got {self.budget}")


def _is_converted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), GBLRTensor)


@register_quantize_module_handler(GBLRConfig)
def _gblr_transform(module: nn.Module, config: GBLRConfig) -> nn.Module:
    """Handler of quantize_: returns the module to put in place."""
    if _is_converted(module):
        return module
    if config.step == "prepare":
        if isinstance(module, GBLRLayer) or not structurable(module) or not can_gain(module, config.row_splits):
            return module
        setting = LayerSettings(
            config.initialiser, config.num_components, config.row_splits, config.align, config.budget, config.seed
        )
        return _structured(type(module).__name__, module, setting)
    if isinstance(module, GBLRLayer):
        if module.sigma is not None:
            raise ConfigError(
                f"GBLRConfig: masks are still smooth (sigma {module.sigma:g}); freeze the structure first"
            )
        return frozen_like(module, module.structure(), plan=config.plan)
    if not structurable(module) or not can_gain(module, config.row_splits):
        return module
    check_structurable(module, type(module).__name__)
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
    return frozen_like(module, matrix, plan=config.plan)
