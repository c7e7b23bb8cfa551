"""NNI's ``config_list`` read for gblr: which layers, with what goal and what start.

Everything that can be refused is refused here, with one line that says where, before a model is touched.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nni.compression.base.config import trans_legacy_config_list
from torch import nn

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..learning.goals import LayerGoal
from ..surgery.layer_settings import DENSE, UNBUDGETED, LayerSettings
from ..surgery.row_splits import row_splits_of
from .keys import GOAL, KEYS_OF_GBLR, PREFIX, START, describe_ignored, read_values
from .selection import select_modules

__all__ = ["LayerConfig", "ModelConfig", "read_config"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerConfig:
    """What a config list says of one layer.

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
class ModelConfig:
    """What a config list says of a model.

    Args:
        layers: By name, in the model's order; a shared module once, under its first name.
        structure_lr: Learning rate of widths and locations; ``None``: that of the weight they replace.
        sigma_start: Smoothness at the start.
        sigma_end: Smoothness before the structure is frozen.
        pace: How far factors move in a step of an optimizer; ``None``: the default.
        compact: Whether dead components are dropped at the freeze.
    """

    layers: dict[str, LayerConfig]
    structure_lr: float | None
    sigma_start: float
    sigma_end: float
    pace: float | None = None
    compact: bool = False


def read_config(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> ModelConfig:
    """Read a config list; the model is only looked at.

    Args:
        model: Names and types are looked up in it.
        config_list: NNI's, also in its legacy form, with gblr's keys.

    Returns:
        What it says of each layer, and of all.

    Raises:
        ConfigError: For a misspelt or unused key, a value out of range, an unknown layer name, an empty selection, or
            goals that contradict each other.
    """
    entries = _entries(config_list)
    layers: dict[str, LayerConfig] = {}
    shared: dict[str, Any] = {}
    ignored: set[str] = set()
    for where, entry in entries:
        values = read_values(entry, where, ignored)
        goal, settings, nni_entry = _layer_values(values, where)
        for key in (name for name in KEYS_OF_GBLR if name not in START):
            if key in values and shared.setdefault(key, values[key]) != values[key]:
                raise ConfigError(
                    f"{where}: {key} is {_plain(values[key])} here and {_plain(shared[key])} in another entry; give one"
                )
        selected = select_modules(model, entry, where)
        dense = {name: module for name, module in selected.items() if not isinstance(module, GBLRLayer)}
        splits = row_splits_of(model, dense, values.get("row_splits", 1))
        for name, module in selected.items():
            if name in layers:
                _logger.warning("%s: layer %r is chosen by an earlier entry already, which holds", where, name)
                continue
            if isinstance(module, GBLRLayer):
                _check_structured(module, name, values, where)
            start = replace(settings, row_splits=splits.get(name, 1))
            layers[name] = LayerConfig(module, start, goal, {"op_names": [name], **nni_entry}, values.get("allocation"))
    if ignored:
        _logger.warning("config_list: gblr leaves out %s", describe_ignored(ignored))
    ordered = {name: layers[name] for name, _ in model.named_modules() if name in layers}
    _check_groups(ordered)
    return ModelConfig(
        ordered,
        shared.get("structure_lr"),
        shared.get("sigma_start", 1.0),
        shared.get("sigma_end", 100.0),
        shared.get("pace"),
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
    start = values.get("start_budget")
    shrinks = threshold is not None or start is not None or "num_components" in values
    initialiser = values.get("initialiser", "svd" if shrinks else DENSE)
    if start is None and initialiser not in UNBUDGETED:
        start = goal.budget
        if start is None:
            raise ConfigError(f"{where}: initialiser {initialiser!r} with sparse_threshold needs start_budget")
    settings = LayerSettings(
        initialiser=initialiser,
        num_components=values.get("num_components"),
        align=align,
        budget=start,
        seed=values.get("seed", 0),
    )
    entry = {key: values[key] for key in GOAL if key in values}
    entry["granularity"] = list(align)
    entry.update({PREFIX + key: values[key] for key in KEYS_OF_GBLR if key in values})
    return goal, settings, entry


def _check_structured(module: GBLRLayer, name: str, values: Mapping[str, Any], where: str) -> None:
    start = [key for key in START if key in values]
    if start:
        raise ConfigError(f"{where}: layer {name!r} is structured already: {start[0]} cannot be set any more")
    if "granularity" in values and values["granularity"] != tuple(module.align):
        raise ConfigError(
            f"{where}: layer {name!r} is structured already, on multiples of {tuple(module.align)}: "
            f"granularity {list(values['granularity'])} cannot be set any more"
        )


def _check_groups(layers: Mapping[str, LayerConfig]) -> None:
    asked: dict[Any, tuple[str, LayerGoal]] = {}
    for name, layer in layers.items():
        goal = layer.goal
        if goal.group is None:
            if layer.allocation is not None:
                raise ConfigError(
                    f"layer {name!r}: allocation splits the budget of a group: give its layers one global_group_id"
                )
            continue
        first, other = asked.setdefault(goal.group, (name, goal))
        if layers[first].allocation != layer.allocation:
            raise ConfigError(
                f"layers {first!r} and {name!r} share global_group_id {goal.group!r}, but not one allocation"
            )
        if (other.budget, other.threshold) != (goal.budget, goal.threshold):
            raise ConfigError(
                f"layers {first!r} and {name!r} share global_group_id {goal.group!r}, but not one sparse_ratio or "
                "sparse_threshold"
            )
