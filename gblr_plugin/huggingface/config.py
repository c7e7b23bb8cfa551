"""The quantization config of transformers' method ``"gblr"``, by which dense checkpoints are compressed on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..decomposition import METHODS
from ..errors import ConfigError
from ..families.registry import get
from ..surgery.conversion import convert, prepare
from ..surgery.row_splits import RowSplits, check_row_splits_given
from ..tensor.gblr_tensor import FACTOR_DTYPES
from ..utils.validation import check_choice, check_count, check_share, did_you_mean

__all__ = ["METHOD", "GBLRHfConfig", "compress_loaded"]

_SETTINGS = ("budget", "layers", "exclude", "family", "method", "align", "row_splits", "factor_dtype", "seed")

METHOD = "gblr"
"""Name of the method, as ``config.json`` has it."""


@register_quantization_config(METHOD)
class GBLRHfConfig(QuantizationConfigMixin):
    """Settings with which ``from_pretrained`` compresses a dense checkpoint, and which its folder keeps.

    A folder of compressed weights needs none of them: structures are in its safetensors files. There they say how it
    was made.

    Args:
        budget: Relative FLOPs of each compressed layer, in (0, 1]; ``None`` in folders that were made in other ways.
        layers: Full names, glob patterns or types; ``None``: every layer that can gain, see
            :func:`~gblr_plugin.surgery.selection.select_layers`.
        exclude: Layers that stay dense.
        family: Name of a structure family, see :func:`gblr_plugin.families.names`.
        method: Decomposition of GBLR matrices, see :func:`gblr_plugin.decompose`.
        align: Tile of rows and columns to which intervals of GBLR matrices snap.
        row_splits: See :func:`~gblr_plugin.surgery.row_splits.row_splits_of`.
        factor_dtype: ``"int8"``: factors are rounded to 8 bits.
        seed: Seed of random draws.
        **kwargs: What transformers adds: the name of the method.

    Raises:
        ConfigError: For an unknown setting or a value out of range.

    Example:
        >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("gpt2", quantization_config=GBLRHfConfig(0.5))  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: float | None = None,
        *,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        family: str = "gblr",
        method: str = "gblr",
        align: int = 1,
        row_splits: RowSplits = 1,
        factor_dtype: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = kwargs.pop("quant_method", METHOD)
        if kwargs:
            name = next(iter(kwargs))
            raise ConfigError(f"gblr: unknown setting {name!r}{did_you_mean(name, _SETTINGS)}")
        if budget is not None:
            check_share("gblr: budget", budget, "relative FLOPs")
        get(family)
        check_choice("gblr: method", method, METHODS)
        check_count("gblr: align", align)
        check_row_splits_given("gblr: row_splits", row_splits)
        check_count("gblr: seed", seed, 0)
        if factor_dtype not in FACTOR_DTYPES:
            raise ConfigError(f"gblr: factor_dtype must be None or 'int8', got {factor_dtype!r}")
        self.budget = budget
        self.layers = None if layers is None else list(layers)
        self.exclude = list(exclude)
        self.family, self.method, self.align, self.seed = family, method, align, seed
        self.row_splits = dict(row_splits) if isinstance(row_splits, Mapping) else row_splits
        self.factor_dtype = factor_dtype

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the method alone where there is no budget."""
        values = super().to_dict()
        return values if self.budget is not None else {"quant_method": self.quant_method}


def compress_loaded(model: Any, config: GBLRHfConfig) -> None:
    """Compress a model whose dense weights ``from_pretrained`` has just loaded, in place.

    Args:
        model: Of transformers.
        config: What is asked for.

    Raises:
        ConfigError: If weights were offloaded to a disk, or a setting cannot be used for the model.
    """
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ConfigError(f"gblr: {absent!r} is offloaded; compress the folder with `gblr compress`, layer by layer")
    options: dict[str, Any] = {}
    if config.family == "gblr":
        options = {"method": config.method, "align": config.align, "seed": config.seed}
    with torch.no_grad():
        prepare(
            model,
            config.layers,
            config.exclude,
            family=config.family,
            budget=config.budget,
            row_splits=config.row_splits,
            **options,
        )
    convert(model, factor_dtype=config.factor_dtype)
