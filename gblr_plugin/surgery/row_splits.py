"""Which layers pack several matrices in their rows: as the user says, or by the type of a model of transformers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..layers.dense import weight_matrix
from ..utils.validation import check_count
from .patterns import check_used, value_of

__all__ = ["AUTO", "RowSplits", "check_row_splits_given", "row_splits_of"]

AUTO = "auto"
"""By the model's type, see :func:`row_splits_of`."""

Rows = int | Sequence[int]
RowSplits = Rows | Mapping[str, Rows] | str
"""A number of equal matrices, the rows of each, a table of these by pattern, or ``"auto"``."""

_logger = logging.getLogger(__name__)


def _grouped_queries(config: Any) -> list[int]:
    """Rows of query, key and value where several heads of queries share one of keys and values."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_key_value_heads * head
    return [config.num_attention_heads * head, shared, shared]


def _shared_head(config: Any) -> list[int]:
    """The same, where all heads of queries share one of keys and values."""
    head = config.n_embd // config.n_head if config.multi_query else config.n_embd
    return [config.n_embd, head, head]


_THREE: dict[str, Rows | Callable[[Any], Rows] | None] = {"c_attn": 3}
_PHI: dict[str, Rows | Callable[[Any], Rows] | None] = {"qkv_proj": _grouped_queries, "gate_up_proj": 2}
_BY_HEADS: dict[str, Rows | Callable[[Any], Rows] | None] = {"query_key_value": None}
_RECIPES: dict[str, dict[str, Rows | Callable[[Any], Rows] | None]] = {
    "bloom": _BY_HEADS,
    "glm": {"gate_up_proj": 2},
    "glm4": {"gate_up_proj": 2},
    "gpt2": _THREE,
    "gpt_bigcode": {"c_attn": _shared_head},
    "gpt_neox": _BY_HEADS,
    "imagegpt": _THREE,
    "modernbert": {"Wqkv": 3, "Wi": 2},
    "mpt": {"Wqkv": 3},
    "openai-gpt": _THREE,
    "persimmon": _BY_HEADS,
    "phi3": _PHI,
    "phi4_multimodal": _PHI,
}
"""By type of model: last names of layers that pack matrices, with their rows. ``None``: rows alternate by heads."""


def check_row_splits_given(what: str, given: Any) -> None:
    """Refuse what no model could take.

    Args:
        what: The argument, for messages.
        given: Its value.

    Raises:
        ConfigError: If it is no number, list of numbers of rows, table of these, or ``"auto"``.
    """
    if given == AUTO:
        return
    for rows in given.values() if isinstance(given, Mapping) else [given]:
        if isinstance(rows, Sequence) and not isinstance(rows, str):
            if not rows:
                raise ConfigError(f"{what}: the list of rows is empty")
            for count in rows:
                check_count(what, count)
        else:
            check_count(what, rows)


def row_splits_of(model: nn.Module, layers: Mapping[str, nn.Module], given: RowSplits) -> dict[str, int]:
    """Into how many equal row splits each layer's weight is divided.

    Matrices of unequal rows (grouped queries: 64, 16, 16) are divided into splits of their greatest common divisor
    (16: six splits), so that no component reaches over a border between two of them.

    Args:
        model: Holds the layers; with ``"auto"`` its configs say of which type it is.
        layers: Dense layers by full name.
        given: A number of equal matrices for all layers, the rows of each matrix, a table of these by pattern, of
            which layers that match none have one matrix, or ``"auto"``: known layers of models of transformers.

    Raises:
        ConfigError: If it is none of these, a pattern matches no layer, or numbers do not fit a layer's rows.
    """
    check_row_splits_given("row_splits", given)
    if isinstance(given, Mapping):
        check_used("row_splits", given, layers, "chosen layer")
    rows: Mapping[str, Rows]
    if isinstance(given, str):
        rows = _of_type(model, layers)
    else:
        table: Any = given
        rows = {name: value_of(table, name, module, 1) for name, module in layers.items()}
    return {name: _count(name, rows.get(name, 1), len(weight_matrix(module))) for name, module in layers.items()}


def _count(name: str, rows: Rows, height: int) -> int:
    if isinstance(rows, int):
        return rows
    if sum(rows) != height:
        raise ConfigError(f"layer {name!r}: row_splits {list(rows)} are {sum(rows)} rows, its weight has {height}")
    return height // math.gcd(*rows)


def _of_type(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Rows]:
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    found: dict[str, Rows] = {}
    alternating = []
    for name in layers:
        outer = max((outer for outer in configs if not outer or name.startswith(f"{outer}.")), key=len, default=None)
        config: Any = None if outer is None else configs[outer]
        recipe = _RECIPES.get(getattr(config, "model_type", ""), {})
        key = next((key for key in recipe if fnmatchcase(name, f"*.{key}")), None)
        rows = None if key is None else recipe[key]
        if callable(rows):
            found[name] = rows(config)
        elif rows is not None:
            found[name] = rows
        elif key is not None:
            alternating.append(name)
    if alternating:
        _logger.warning(
            "row_splits: %s stay one matrix each, since the rows of query, key and value alternate head by head",
            f"{len(alternating)} layers, {alternating[0]} to {alternating[-1]}",
        )
    return found
