"""NNI's ``config_list`` read for gblr: which layers, with what goal and what start.

Everything that can be refused is refused here, with one line that says where, before a model is touched.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting, QuantizationSetting
from nni.compression.utils.fused_utils import FUSED_MODULES_TYPES_LIST
from schema import Optional, Schema
from torch import nn

from ..calibration.allocation import RULES
from ..errors import ConfigError
from ..layers import GBLRConv1d, GBLRConv2d, GBLRLayer, GBLRLinear
from ..learning.goals import LayerGoal
from ..surgery.layer_settings import INITIALISERS, UNBUDGETED, LayerSettings
from ..surgery.matrices import is_layer
from ..surgery.patterns import check_used, matches
from ..surgery.selection import choose, log_skipped
from ..utils.validation import did_you_mean

__all__ = [
    "OWN_PREFIX",
    "LayerPlan",
    "Plan",
    "for_nni",
    "nni_schema",
    "read_config",
    "select_modules",
    "without_own_keys",
]

_logger = logging.getLogger(__name__)

OWN_PREFIX = "gblr_"
"""Own keys stand in a config entry with this prefix, or without it in a nested ``gblr:`` table."""

_SELECTION = (
    "op_names",
    "op_types",
    "op_names_re",
    "exclude_op_names",
    "exclude_op_types",
    "exclude_op_names_re",
)
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


# -- single values -----------------------------------------------------------------------------------------------------


def _number(
    low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> tuple[Callable[..., Any], str]:
    def read(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        inside = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
        return float(value) if inside else None

    closing = "" if high == math.inf else f"{high:g}"
    if high == math.inf:
        allowed = f"a finite number {'above' if low_open else 'of at least'} {low:g}"
    else:
        allowed = f"a number in {'(' if low_open else '['}{low:g}, {closing}{')' if high_open else ']'}"
    return read, allowed


def _integer(low: int) -> tuple[Callable[..., Any], str]:
    def read(value: Any) -> int | None:
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= low else None

    return read, f"an integer of at least {low}"


def _read_initialiser(value: Any) -> str | None:
    return value if isinstance(value, str) and value in INITIALISERS else None


def _read_rule(value: Any) -> str | None:
    return value if isinstance(value, str) and value in RULES else None


def _read_group(value: Any) -> int | str | None:
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _read_granularity(value: Any) -> tuple[int, int] | None:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if pair and all(isinstance(tile, int) and not isinstance(tile, bool) and tile >= 1 for tile in value):
        return value[0], value[1]
    return None


def _whole_channels(granularity: Any) -> bool:
    """Whether NNI would remove whole input or output channels; in lists it writes -1 for a whole axis."""
    return granularity in ("in_channel", "out_channel") or (
        isinstance(granularity, (list, tuple)) and -1 in granularity
    )


def _read_switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


# Key: how its value is read (None: not allowed), and what is allowed.
_GOAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sparse_ratio": _number(0, 1, high_open=True),
    "sparse_threshold": _number(0, math.inf),
    "max_sparse_ratio": _number(0, 1, low_open=True),
    "min_sparse_ratio": _number(0, 1, high_open=True),
    "global_group_id": (_read_group, "an integer or a string"),
    "granularity": (_read_granularity, "'default' or a pair [rows, columns] of positive integers"),
}
_OWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "num_components": _integer(1),
    "initialiser": (_read_initialiser, "one of " + ", ".join(INITIALISERS)),
    "row_splits": _integer(1),
    "seed": _integer(0),
    "start_budget": _number(0, 1, low_open=True),
    "allocation": (_read_rule, "one of " + ", ".join(RULES)),
    "structure_lr": _number(0, math.inf, low_open=True),
    "sigma_start": _number(0, math.inf, low_open=True),
    "sigma_end": _number(0, math.inf, low_open=True),
    "compact": (_read_switch, "true or false"),
}
_LAYER_OWN = ("num_components", "initialiser", "row_splits", "seed", "start_budget", "allocation")
_SHARED_OWN = ("structure_lr", "sigma_start", "sigma_end", "compact")

_WEIGHT_SETTING: dict[str, Any] = {
    **dict.fromkeys(_GOAL),
    "granularity": "default",
    "apply_method": "bypass",
    **{OWN_PREFIX + key: None for key in _OWN},
}
# NNI looks settings up by the module's type name. There is no bias target, and only activations can be quantized, if
# asked for behind the norm and activation that a quantizer fuses with the layer.
for _kind in (GBLRLinear, GBLRConv1d, GBLRConv2d):
    PruningSetting.register(_kind.__name__, {"weight": _WEIGHT_SETTING})
    QuantizationSetting.register(_kind.__name__, QuantizationSetting.activation_setting)
    if _kind not in FUSED_MODULES_TYPES_LIST:
        FUSED_MODULES_TYPES_LIST.append(_kind)


def nni_schema() -> Schema:
    """NNI's schema of a pruning entry, with gblr's own keys."""
    own = {
        Optional(OWN_PREFIX + key): (lambda value, read=read: read(value) is not None)
        for key, (read, _) in _OWN.items()
    }
    return Schema({**default_config_schema("pruning").schema, **own})


# -- what a config list says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one layer.

    Args:
        module: Dense, or structured already.
        settings: Its start.
        goal: Where its structure is to end.
        entry: Its entry in NNI's terms: one name, goals as floats, own keys with their prefix.
        allocation: Rule by which its group's budget is split at the start; ``None``: as the family does.
    """

    module: nn.Module
    settings: LayerSettings
    goal: LayerGoal
    entry: dict[str, Any]
    allocation: str | None = None


@dataclass(frozen=True)
class Plan:
    """A whole config list.

    Args:
        layers: By name, in the model's order; a shared module once, under its first name.
        structure_lr: Learning rate of widths and locations; ``None``: that of the weight they replace.
        sigma_start: Smoothness at the start.
        sigma_end: Smoothness before the structure is frozen.
        compact: Whether dead components are dropped at the freeze.
    """

    layers: dict[str, LayerPlan]
    structure_lr: float | None
    sigma_start: float
    sigma_end: float
    compact: bool = False


def read_config(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> Plan:
    """Read a config list; the model is only looked at.

    Args:
        model: Names and types are looked up in it.
        config_list: NNI's, also in its legacy form, with gblr's keys.

    Returns:
        The plan.

    Raises:
        ConfigError: For a misspelt or unused key, a value out of range, an unknown layer name, an empty selection, or
            goals that contradict each other.
    """
    entries = _entries(config_list)
    plans: dict[str, LayerPlan] = {}
    shared: dict[str, Any] = {}
    ignored: set[str] = set()
    for where, entry in entries:
        values = _flat(entry, where, ignored)
        goal, settings, nni_entry = _layer_values(values, where)
        for key in _SHARED_OWN:
            if key in values and shared.setdefault(key, values[key]) != values[key]:
                raise ConfigError(
                    f"{where}: {key} is {_plain(values[key])} here and {_plain(shared[key])} in another entry; give one"
                )
        for name, module in select_modules(model, entry, where).items():
            if name in plans:
                _logger.warning("%s: layer %r is chosen by an earlier entry already, which holds", where, name)
                continue
            if isinstance(module, GBLRLayer):
                _check_structured(module, name, values, where)
            plans[name] = LayerPlan(module, settings, goal, {"op_names": [name], **nni_entry}, values.get("allocation"))
    if ignored:
        reasons = "; ".join(f"{key} ({_IGNORED[key]})" for key in sorted(ignored))
        _logger.warning("config_list: gblr leaves out %s", reasons)
    ordered = {name: plans[name] for name, _ in model.named_modules() if name in plans}
    _check_groups(ordered)
    return Plan(
        ordered,
        shared.get("structure_lr"),
        shared.get("sigma_start", 1.0),
        shared.get("sigma_end", 100.0),
        shared.get("compact", False),
    )


def _plain(value: Any) -> str:
    """A value as the config writes it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _entries(config_list: Any) -> list[tuple[str, dict[str, Any]]]:
    """Entries of the present format, each with its place for messages."""
    if isinstance(config_list, (str, Mapping)) or not isinstance(config_list, Iterable):
        raise ConfigError(f"config_list: need a list of tables, got a {type(config_list).__name__}")
    given = [copy.deepcopy(entry) for entry in config_list]
    if not given:
        raise ConfigError("config_list is empty: give at least one entry with op_names, op_types or op_names_re")
    for index, entry in enumerate(given):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"config_list[{index}]: need a table of keys, got {entry!r}")
    only_exclude = [bool(entry.get("exclude")) for entry in given]
    present = trans_legacy_config_list(given)
    if present is not given:  # NNI's translation of legacy lists knows another key for groups
        for entry in present:
            weight = entry.get("target_settings", {}).get("weight", {})
            if "group_id" in weight:
                weight["global_group_id"] = weight.pop("group_id")
    elif any(only_exclude):
        raise ConfigError(
            f"config_list[{only_exclude.index(True)}]: exclude: write exclude_op_names in the other entries"
        )
    entries = [
        (f"config_list[{index}]", dict(entry))
        for index, (entry, excluded) in enumerate(zip(present, only_exclude, strict=True))
        if not excluded
    ]
    if not entries:
        raise ConfigError("config_list: all entries exclude; none says what to compress")
    return entries


def _flat(entry: Mapping[str, Any], where: str, ignored: set[str]) -> dict[str, Any]:
    """Goal and own keys of an entry, wherever in it they stand, with their values read.

    Keys of NNI that say nothing to gblr are added to ``ignored``.
    """
    targets = entry.get("target_names") or ["weight"]
    if not isinstance(targets, (list, tuple)) or "weight" not in targets or set(targets) - {"weight", "bias"}:
        raise ConfigError(
            f"{where}: target_names: gblr compresses 'weight' only ('bias' beside it is left out), got {targets!r}"
        )
    values: dict[str, Any] = {}

    def put(key: str, raw: Any, place: str) -> None:
        if raw is None:  # `key:` without a value in YAML, or NNI's own default
            return
        read, allowed = _GOAL.get(key) or _OWN[key]
        value = read(raw)
        if value is None:
            raise ConfigError(f"{place}: {key} must be {allowed}, got {raw!r}")
        if values.setdefault(key, value) != value:
            raise ConfigError(f"{place}: {key} is given twice, as {values[key]!r} and {value!r}")

    def read_table(table: Mapping[str, Any], place: str, others: Sequence[str]) -> None:
        for key, raw in table.items():
            if key in others:
                continue
            if key == "granularity" and _whole_channels(raw):
                ignored.add(_CHANNELS)
            elif key in _GOAL:
                put(key, None if (key, raw) == ("granularity", "default") else raw, place)
            elif isinstance(key, str) and key.removeprefix(OWN_PREFIX) in _OWN and key.startswith(OWN_PREFIX):
                put(key.removeprefix(OWN_PREFIX), raw, place)
            elif key == "gblr":
                if not isinstance(raw, Mapping):
                    raise ConfigError(f"{place}: gblr must be a table of {', '.join(_OWN)}, got {raw!r}")
                for own, value in raw.items():
                    if own not in _OWN:
                        hint = did_you_mean(own, _OWN)
                        raise ConfigError(f"{place}: unknown key {own!r} in gblr{hint} (allowed: {', '.join(_OWN)})")
                    put(own, value, f"{place}: gblr")
            elif key in _IGNORED:
                if raw is not None:
                    ignored.add(key)
            elif key in _REFUSED:
                if raw is not None:
                    raise ConfigError(f"{place}: {key} has no meaning for gblr: {_REFUSED[key]}")
            else:
                known = [*others, *_GOAL, "gblr", *(OWN_PREFIX + name for name in _OWN)]
                near = did_you_mean(key, [*known, *_OWN]) if key not in _OWN else f"; did you mean '{OWN_PREFIX}{key}'?"
                raise ConfigError(f"{place}: unknown key {key!r}{near} (allowed: {', '.join(known)})")

    read_table(entry, where, (*_SELECTION, "target_names", "target_settings"))
    settings = entry.get("target_settings") or {}
    tables = isinstance(settings, Mapping) and all(isinstance(table, Mapping) for table in settings.values())
    if not tables or set(settings) - {"weight", "bias"}:
        raise ConfigError(f"{where}: target_settings: gblr compresses 'weight' only, got {settings!r}")
    for key, raw in settings.get("bias", {}).items():
        if key not in ("align", "apply_method") and raw is not None:
            raise ConfigError(f"{where}: target_settings: bias: gblr leaves biases as they are; take {key} out")
    if "bias" in (*targets, *settings):
        ignored.add(_BIAS)
    # What stands under the target overrides the entry's own shortcut, as in NNI.
    nested = settings.get("weight", {})
    for key in nested:
        values.pop(str(key).removeprefix(OWN_PREFIX), None)
    read_table(nested, f"{where}: target_settings: weight", ())
    return values


def _layer_values(values: Mapping[str, Any], where: str) -> tuple[LayerGoal, LayerSettings, dict[str, Any]]:
    ratio, threshold = values.get("sparse_ratio"), values.get("sparse_threshold")
    if (ratio is None) == (threshold is None):
        raise ConfigError(
            f"{where}: give sparse_ratio (a budget of 1 - sparse_ratio) or sparse_threshold (a fixed lambda), "
            + ("not both" if ratio is not None else "one is missing")
        )
    if "allocation" in values and ratio is None:
        raise ConfigError(f"{where}: allocation splits a budget: it needs sparse_ratio")
    least, most = values.get("min_sparse_ratio", None), values.get("max_sparse_ratio", None)
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{where}: min_sparse_ratio {least:g} is above max_sparse_ratio {most:g}")
    if (least is not None or most is not None) and ratio is None:
        raise ConfigError(f"{where}: min_sparse_ratio and max_sparse_ratio bound a budget: they need sparse_ratio")
    if (
        "global_group_id" not in values
        and ratio is not None
        and not (least or 0.0) <= ratio <= (1.0 if most is None else most)
    ):
        raise ConfigError(f"{where}: sparse_ratio {ratio:g} is outside min_sparse_ratio .. max_sparse_ratio")
    goal = LayerGoal(
        budget=None if ratio is None else 1.0 - ratio,
        threshold=threshold,
        group=values.get("global_group_id"),
        min_flops=0.0 if most is None else 1.0 - most,
        max_flops=math.inf if least is None else 1.0 - least,
    )
    align = values.get("granularity", (1, 1))
    initialiser = values.get("initialiser", "svd")
    start = values.get("start_budget")
    if start is None and initialiser not in UNBUDGETED:
        start = goal.budget
        if start is None:
            raise ConfigError(f"{where}: initialiser {initialiser!r} with sparse_threshold needs start_budget")
    settings = LayerSettings(
        initialiser=initialiser,
        num_components=values.get("num_components"),
        row_splits=values.get("row_splits", 1),
        align=align,
        budget=start,
        seed=values.get("seed", 0),
    )
    entry = {key: values[key] for key in _GOAL if key in values}
    entry["granularity"] = list(align)
    entry.update({OWN_PREFIX + key: values[key] for key in _OWN if key in values})
    return goal, settings, entry


def _check_structured(module: GBLRLayer, name: str, values: Mapping[str, Any], where: str) -> None:
    start = [key for key in _LAYER_OWN if key in values]
    if start:
        raise ConfigError(f"{where}: layer {name!r} is structured already: {start[0]} cannot be set any more")
    if "granularity" in values and values["granularity"] != tuple(module.align):
        raise ConfigError(
            f"{where}: layer {name!r} is structured already, on multiples of {tuple(module.align)}: "
            f"granularity {list(values['granularity'])} cannot be set any more"
        )


def _check_groups(plans: Mapping[str, LayerPlan]) -> None:
    asked: dict[Any, tuple[str, LayerGoal]] = {}
    for name, plan in plans.items():
        goal = plan.goal
        if goal.group is None:
            if plan.allocation is not None:
                raise ConfigError(
                    f"layer {name!r}: allocation splits the budget of a group: give its layers one global_group_id"
                )
            continue
        first, other = asked.setdefault(goal.group, (name, goal))
        if plans[first].allocation != plan.allocation:
            raise ConfigError(
                f"layers {first!r} and {name!r} share global_group_id {goal.group!r}, but not one allocation"
            )
        if (other.budget, other.threshold) != (goal.budget, goal.threshold):
            raise ConfigError(
                f"layers {first!r} and {name!r} share global_group_id {goal.group!r}, but not one sparse_ratio or "
                "sparse_threshold"
            )


# -- choosing modules --------------------------------------------------------------------------------------------------


class _Wish:
    """What an entry asks for by NNI's keys, read against a model.

    ``op_names`` (or ``op_names_re``) and ``op_types`` are intersected where both are given, as NNI does. Names may be
    any patterns of this package, and types mean subclasses too.

    Args:
        model: Chosen from.
        entry: Holds op_names, op_types, op_names_re and their exclude_ forms.
        where: Place of the entry, for messages.

    Raises:
        ConfigError: For an unknown name, or an invalid regular expression.
    """

    def __init__(self, model: nn.Module, entry: Mapping[str, Any], where: str) -> None:
        modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        self.names: dict[int, list[str]] = {id(model): [""]}
        for name, module in modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.given = {key: entry[key] for key in _SELECTION if entry.get(key) is not None}
        for key, listed in self.given.items():
            if not isinstance(listed, (list, tuple)) or not all(isinstance(value, str) for value in listed):
                raise ConfigError(f"{where}: {key} must be a list of strings, got {listed!r}")
        if not any(self.given.get(key) for key in ("op_names", "op_types", "op_names_re")):
            raise ConfigError(f"{where}: give op_names, op_types or op_names_re")
        for key in ("op_names", "exclude_op_names"):
            check_used(f"{where}: {key}", self.given.get(key, ()), modules, "module of the model")
        for key in ("op_names_re", "exclude_op_names_re"):
            for pattern in self.given.get(key, ()):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{where}: {key}: {pattern!r} is no regular expression: {error}") from None
        unused = _unused(modules, self.given)
        if unused:
            _logger.warning("%s: no module of the model matches %s", where, ", ".join(unused))
        self.in_full = {id(modules[name]) for name in self.given.get("op_names", ()) if name in modules}

    def __call__(self, name: str, module: nn.Module) -> bool:
        """Whether a module is asked for."""
        by_name = self.given.get("op_names") or self.given.get("op_names_re")
        by_type = self.given.get("op_types")
        if (by_name and not self._by_name("", module)) or (by_type and not self._by_type("", module)):
            return False
        return not self._by_name("exclude_", module) and not self._by_type("exclude_", module)

    def _by_name(self, prefix: str, module: nn.Module) -> bool:
        names = self.names[id(module)]
        patterns, expressions = (self.given.get(f"{prefix}{key}", ()) for key in ("op_names", "op_names_re"))
        return any(matches(pattern, name, module) for pattern in patterns for name in names) or any(
            re.match(expression, name) for expression in expressions for name in names
        )

    def _by_type(self, prefix: str, module: nn.Module) -> bool:
        return any(matches(kind, "", module) for kind in self.given.get(f"{prefix}op_types", ()))


def select_modules(model: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, nn.Module]:
    """The layers that an entry chooses for gblr and its families, in the model's order; what stays dense is logged.

    Args:
        model: Chosen from.
        entry: Holds op_names, op_types, op_names_re and their exclude_ forms.
        where: Place of the entry, for messages.

    Returns:
        Module by its first name: dense layers by the policy of :mod:`gblr_plugin.surgery.selection`, and structured
        ones.

    Raises:
        ConfigError: For an unknown name, an invalid regular expression, a layer named in full that is tied or cannot be
            structured, or an empty selection.
    """
    wish = _Wish(model, entry, where)
    asked = {name: module for name, module in model.named_modules() if wish(name, module)}
    structured = {name: module for name, module in asked.items() if isinstance(module, GBLRLayer)}
    named = [name for name, module in asked.items() if id(module) in wish.in_full and name not in structured]
    if "" in asked and is_layer(model):
        raise ConfigError(f"{where}: the model is itself the layer: put it into a container, e.g. nn.Sequential")
    selection = choose(model, lambda name, module: wish(name, module) and name not in structured, named)
    log_skipped(selection.skipped)
    selected = {name: module for name, module in asked.items() if name in selection.layers or name in structured}
    if not selected:
        reason = f": layer {selection.skipped[0].name!r}: {selection.skipped[0].reason}" if selection.skipped else ""
        raise ConfigError(f"{where}: the selection is empty: no layer of the model matches {wish.given}{reason}")
    return selected


def _unused(modules: Mapping[str, nn.Module], given: Mapping[str, Sequence[str]]) -> list[str]:
    """Types and regular expressions that match nothing: a misspelt exclude_op_types excludes nothing in silence."""
    unused = []
    for key, listed in given.items():
        if key.endswith("op_types"):
            found = [kind for kind in listed if not any(matches(kind, "", module) for module in modules.values())]
        elif key.endswith("_re"):
            found = [part for part in listed if not any(re.match(part, name) for name in modules)]
        else:
            found = []
        unused += [f"{key} {one!r}" for one in found]
    return unused


def for_nni(model: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An entry for one of NNI's own compressors: it chooses by full names, types and regular expressions alone.

    Args:
        model: Chosen from.
        entry: Its names may be any patterns of this package.
        where: Place of the entry, for messages.

    Raises:
        ConfigError: For an unknown name, an invalid regular expression, or an empty selection.
    """
    wish, plain = _Wish(model, entry, where), dict(entry)
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in ("op_names", "exclude_op_names"):
        if key in plain:
            found = {
                name: module
                for name, module in modules.items()
                if any(matches(pattern, name, module) for pattern in plain[key])
            }
            plain[key] = [name for name, module in found.items() if name in plain[key] or _has_matrix(module)]
    if not select_modules_by_config(model, {key: plain[key] for key in wish.given})[0]:
        raise ConfigError(f"{where}: the selection is empty: no layer of the model matches {wish.given}")
    return plain


def _has_matrix(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) >= 2


def without_own_keys(config_list: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A config list as NNI's own compressors take it: without gblr's keys, and with whole numbers as floats."""
    plain = []
    for given in config_list:
        entry = {key: value for key, value in copy.deepcopy(dict(given)).items() if key != "gblr"}
        entry = {key: value for key, value in entry.items() if not str(key).startswith(OWN_PREFIX)}
        for table in (entry, *dict(entry.get("target_settings") or {}).values()):
            for key in ("sparse_ratio", "sparse_threshold"):
                if isinstance(table.get(key), int):
                    table[key] = float(table[key])
        plain.append(entry)
    return plain
