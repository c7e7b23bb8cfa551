"""The keys of NNI's ``config_list`` that gblr reads: their meaning, their values, and what NNI is told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nni.compression.base.config import default_config_schema
from nni.compression.base.setting import PruningSetting, QuantizationSetting
from nni.compression.utils.fused_utils import FUSED_MODULES_TYPES_LIST
from schema import Optional, Schema

from ..calibration.allocation import RULES
from ..errors import ConfigError
from ..layers import GBLRConv1d, GBLRConv2d, GBLRLinear
from ..layers.learned_rank import LearnedRankConv1d, LearnedRankConv2d, LearnedRankLinear
from ..surgery.layer_settings import INITIALISERS
from ..surgery.row_splits import check_row_splits_given
from ..utils.validation import describe_interval, did_you_mean, in_interval, is_whole

__all__ = ["GOAL", "KEYS_OF_GBLR", "PREFIX", "SELECTION", "START", "describe_ignored", "nni_schema", "read_values"]

PREFIX = "gblr_"
"""gblr's keys stand in a config entry with this prefix, or without it in a nested ``gblr:`` table."""

SELECTION = (
    "op_names",
    "op_types",
    "op_names_re",
    "exclude_op_names",
    "exclude_op_types",
    "exclude_op_names_re",
)
"""Keys that say which modules are meant."""

_REFUSED = {
    "align": "each layer learns intervals of its own, which cannot follow another layer's mask",
    "fuse_names": "it belongs to quantizers",
    "op_partial_names": "write op_names_re: ['.*part.*'] (NNI reads it in old lists only)",
}
_BIAS, _CHANNELS = "the target 'bias'", "granularity of whole channels"
_IGNORED = {
    "apply_method": "a structured layer applies no mask",
    "dependency_group_id": "the layers of a dependency group need no common mask; global_group_id lets layers share a "
    "budget",
    "internal_metric_block": "there is no metric over elements",
    _BIAS: "biases stay as they are",
    _CHANNELS: "intervals are learned, on any rows and columns; [rows, columns] gives them a tile",
}


class _Key(NamedTuple):
    """How a value is read, ``None`` where it is not allowed, and what is allowed."""

    read: Callable[[Any], Any]
    allowed: str


def _number(interval: str) -> _Key:
    return _Key(lambda value: float(value) if in_interval(value, interval) else None, describe_interval(interval))


def _integer(low: int) -> _Key:
    return _Key(lambda value: value if is_whole(value) and value >= low else None, f"an integer of at least {low}")


def _choice(names: Sequence[str]) -> _Key:
    read = lambda value: value if isinstance(value, str) and value in names else None  # noqa: E731
    return _Key(read, "one of " + ", ".join(names))


def _read_tile(value: Any) -> tuple[int, int] | None:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(is_whole(tile) and tile >= 1 for tile in value)
    return (value[0], value[1]) if pair else None


def _read_row_splits(value: Any) -> Any:
    if isinstance(value, Mapping):
        return None  # an entry of the config list is for layers of one kind
    try:
        check_row_splits_given("row_splits", value)
    except ConfigError:
        return None
    return value


GOAL = {
    "sparse_ratio": _number("[0, 1)"),
    "sparse_threshold": _number("[0, inf)"),
    "max_sparse_ratio": _number("(0, 1]"),
    "min_sparse_ratio": _number("[0, 1)"),
    "global_group_id": _Key(
        lambda value: value if is_whole(value) or isinstance(value, str) else None, "an integer or a string"
    ),
    "granularity": _Key(_read_tile, "'default' or a pair [rows, columns] of positive integers"),
}
"""NNI's keys that say where a layer's structure is to end."""

START = {
    "num_components": _integer(1),
    "initialiser": _choice(INITIALISERS),
    "row_splits": _Key(_read_row_splits, "a positive integer, a list of numbers of rows, or 'auto'"),
    "seed": _integer(0),
    "start_budget": _number("(0, 1]"),
    "allocation": _choice(RULES),
}
"""gblr's keys that say how a layer starts."""

KEYS_OF_GBLR = {
    **START,
    "structure_lr": _number("(0, inf)"),
    "sigma_start": _number("(0, inf)"),
    "sigma_end": _number("(0, inf)"),
    "pace": _number("[1, inf)"),
    "compact": _Key(lambda value: value if isinstance(value, bool) else None, "true or false"),
}
"""All keys of gblr; those that are not of a start hold for the whole config list."""

# NNI looks settings up by the module's type name. There is no bias target, and only activations can be quantized, if
# asked for behind the norm and activation that a quantizer fuses with the layer.
_WEIGHT_SETTING: dict[str, Any] = {
    **dict.fromkeys(GOAL),
    "granularity": "default",
    "apply_method": "bypass",
    **{PREFIX + key: None for key in KEYS_OF_GBLR},
}
for _kind in (GBLRLinear, GBLRConv1d, GBLRConv2d, LearnedRankLinear, LearnedRankConv1d, LearnedRankConv2d):
    PruningSetting.register(_kind.__name__, {"weight": _WEIGHT_SETTING})
    QuantizationSetting.register(_kind.__name__, QuantizationSetting.activation_setting)
    if _kind not in FUSED_MODULES_TYPES_LIST:
        FUSED_MODULES_TYPES_LIST.append(_kind)


def nni_schema() -> Schema:
    """NNI's schema of a pruning entry, with gblr's keys."""
    keys = {Optional(PREFIX + name): _accepts(key) for name, key in KEYS_OF_GBLR.items()}
    return Schema({**default_config_schema("pruning").schema, **keys})


def _accepts(key: _Key) -> Callable[[Any], bool]:
    return lambda value: key.read(value) is not None


def describe_ignored(ignored: set[str]) -> str:
    """The keys of NNI that say nothing to gblr, with the reasons."""
    return "; ".join(f"{key} ({_IGNORED[key]})" for key in sorted(ignored))


def read_values(entry: Mapping[str, Any], where: str, ignored: set[str]) -> dict[str, Any]:
    """The values of an entry's goal keys and of gblr's, wherever in it they stand.

    Args:
        entry: Of the present format of NNI.
        where: Its place, for messages.
        ignored: Gets the keys of NNI that say nothing to gblr.

    Raises:
        ConfigError: For an unknown key, or a value that is not allowed.
    """
    targets = entry.get("target_names") or ["weight"]
    if not isinstance(targets, (list, tuple)) or "weight" not in targets or set(targets) - {"weight", "bias"}:
        raise ConfigError(
            f"{where}: target_names: gblr compresses 'weight' only ('bias' beside it is left out), got {targets!r}"
        )
    settings = entry.get("target_settings") or {}
    tables = isinstance(settings, Mapping) and all(isinstance(table, Mapping) for table in settings.values())
    if not tables or set(settings) - {"weight", "bias"}:
        raise ConfigError(f"{where}: target_settings: gblr compresses 'weight' only, got {settings!r}")
    for key, raw in settings.get("bias", {}).items():
        if key not in ("align", "apply_method") and raw is not None:
            raise ConfigError(f"{where}: target_settings: bias: gblr leaves biases as they are; take {key} out")
    if "bias" in (*targets, *settings):
        ignored.add(_BIAS)
    values = _Table(where, (*SELECTION, "target_names", "target_settings"), ignored).read(entry)
    # What stands under the target overrides the entry's own shortcut, as in NNI.
    nested = _Table(f"{where}: target_settings: weight", (), ignored).read(settings.get("weight", {}))
    given = {str(key).removeprefix(PREFIX) for key in settings.get("weight", {})}
    return {**{key: value for key, value in values.items() if key not in given}, **nested}


class _Table:
    """Reads one table of keys.

    Args:
        where: Its place, for messages.
        others: Keys that are read elsewhere.
        ignored: Gets the keys of NNI that say nothing to gblr.
    """

    def __init__(self, where: str, others: Sequence[str], ignored: set[str]) -> None:
        self._where, self._others, self._ignored = where, others, ignored
        self._values: dict[str, Any] = {}

    def read(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the table's goal keys and of gblr's."""
        for key, raw in table.items():
            if key not in self._others:
                self._read_key(key, raw)
        return self._values

    def _read_key(self, key: Any, raw: Any) -> None:
        bare = str(key).removeprefix(PREFIX)
        if key == "granularity" and _is_of_channels(raw):
            self._ignored.add(_CHANNELS)
        elif key in GOAL:
            self._put(key, None if (key, raw) == ("granularity", "default") else raw, self._where)
        elif bare in KEYS_OF_GBLR and bare != key:
            self._put(bare, raw, self._where)
        elif key == "gblr":
            self._read_nested(raw)
        elif key in _IGNORED:
            self._ignored.update([] if raw is None else [key])
        elif key not in _REFUSED:
            known = [*self._others, *GOAL, "gblr", *(PREFIX + name for name in KEYS_OF_GBLR)]
            hint = (
                f"; did you mean '{PREFIX}{key}'?"
                if key in KEYS_OF_GBLR
                else did_you_mean(key, [*known, *KEYS_OF_GBLR])
            )
            raise ConfigError(f"{self._where}: unknown key {key!r}{hint} (allowed: {', '.join(known)})")
        elif raw is not None:
            raise ConfigError(f"{self._where}: {key} has no meaning for gblr: {_REFUSED[key]}")

    def _read_nested(self, table: Any) -> None:
        allowed = ", ".join(KEYS_OF_GBLR)
        if not isinstance(table, Mapping):
            raise ConfigError(f"{self._where}: gblr must be a table of {allowed}, got {table!r}")
        for key, raw in table.items():
            if key not in KEYS_OF_GBLR:
                hint = did_you_mean(key, KEYS_OF_GBLR)
                raise ConfigError(f"{self._where}: unknown key {key!r} in gblr{hint} (allowed: {allowed})")
            self._put(key, raw, f"{self._where}: gblr")

    def _put(self, key: str, raw: Any, place: str) -> None:
        if raw is None:  # `key:` without a value in YAML, or NNI's own default
            return
        read, allowed = {**GOAL, **KEYS_OF_GBLR}[key]
        value = read(raw)
        if value is None:
            raise ConfigError(f"{place}: {key} must be {allowed}, got {raw!r}")
        if self._values.setdefault(key, value) != value:
            raise ConfigError(f"{place}: {key} is given twice, as {self._values[key]!r} and {value!r}")


def _is_of_channels(granularity: Any) -> bool:
    """Whether NNI would remove whole input or output channels; in lists it writes -1 for a whole axis."""
    in_list = isinstance(granularity, (list, tuple)) and -1 in granularity
    return in_list or granularity in ("in_channel", "out_channel")
