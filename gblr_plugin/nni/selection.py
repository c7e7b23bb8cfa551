"""Which modules of a model an entry of NNI's ``config_list`` means."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config
from torch import nn

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..surgery.matrices import is_layer
from ..surgery.patterns import check_used, matches
from ..surgery.selection import choose, log_skipped
from .keys import PREFIX, SELECTION

__all__ = ["for_nni", "select_modules", "without_gblr_keys"]

_logger = logging.getLogger(__name__)


class _Choice:
    """Says of a module whether an entry asks for it by NNI's keys.

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
        self.given = {key: entry[key] for key in SELECTION if entry.get(key) is not None}
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
    choice = _Choice(model, entry, where)
    asked = {name: module for name, module in model.named_modules() if choice(name, module)}
    structured = {name: module for name, module in asked.items() if isinstance(module, GBLRLayer)}
    named = [name for name, module in asked.items() if id(module) in choice.in_full and name not in structured]
    if "" in asked and is_layer(model):
        raise ConfigError(f"{where}: the model is itself the layer: put it into a container, e.g. nn.Sequential")
    selection = choose(model, lambda name, module: choice(name, module) and name not in structured, named)
    log_skipped(selection.skipped)
    selected = {name: module for name, module in asked.items() if name in selection.layers or name in structured}
    if not selected:
        reason = f": layer {selection.skipped[0].name!r}: {selection.skipped[0].reason}" if selection.skipped else ""
        raise ConfigError(f"{where}: the selection is empty: no layer of the model matches {choice.given}{reason}")
    return selected


def _unused(modules: Mapping[str, nn.Module], given: Mapping[str, Sequence[str]]) -> list[str]:
    """Types and regular expressions that match nothing: a misspelt exclude_op_types excludes nothing in silence."""
    unused = []
    for key, listed in given.items():
        if key.endswith("op_types"):
            found = [kind for kind in listed if not any(matches(kind, "", module) for module in modules.values())]
        elif key.endswith("_re"):
            found = [pattern for pattern in listed if not any(re.match(pattern, name) for name in modules)]
        else:
            found = []
        unused += [f"{key} {pattern!r}" for pattern in found]
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
    choice, plain = _Choice(model, entry, where), dict(entry)
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in ("op_names", "exclude_op_names"):
        if key in plain:
            found = {
                name: module
                for name, module in modules.items()
                if any(matches(pattern, name, module) for pattern in plain[key])
            }
            plain[key] = [name for name, module in found.items() if name in plain[key] or _has_matrix(module)]
    if not select_modules_by_config(model, {key: plain[key] for key in choice.given})[0]:
        raise ConfigError(f"{where}: the selection is empty: no layer of the model matches {choice.given}")
    return plain


def _has_matrix(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) >= 2


def without_gblr_keys(config_list: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A config list as NNI's own compressors take it: without gblr's keys, and with whole numbers as floats."""
    plain = []
    for given in config_list:
        entry = {key: value for key, value in copy.deepcopy(dict(given)).items() if key != "gblr"}
        entry = {key: value for key, value in entry.items() if not str(key).startswith(PREFIX)}
        for table in (entry, *dict(entry.get("target_settings") or {}).values()):
            for key in ("sparse_ratio", "sparse_threshold"):
                if isinstance(table.get(key), int):
                    table[key] = float(table[key])
        plain.append(entry)
    return plain
