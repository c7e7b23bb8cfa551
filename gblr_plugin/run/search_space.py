"""The space of `gblr search`: NNI's notation over the keys of a run, and what a choice changes in the run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from ..utils.validation import check_share, is_number, is_whole
from .settings import RunSettings
from .yaml_config import Located, parse_overrides, read_settings

__all__ = ["ALIASES", "SearchSpace", "overrides", "with_parameters"]

ALIASES = {"compressor": "methods.0.name", "initialiser": "config_list.*.gblr.initialiser"}
"""Short keys. ``budget`` is one too where the run has a ``config_list``: one minus each entry's ``sparse_ratio``."""

_NUMBERS = {  # how many, and what they are
    "randint": (2, "[low, high), whole numbers"),
    "uniform": (2, "[low, high]"),
    "loguniform": (2, "[low, high], above 0"),
    "quniform": (3, "[low, high, step]"),
    "qloguniform": (3, "[low, high, step], above 0"),
    "normal": (2, "[mean, deviation]"),
    "lognormal": (2, "[mean, deviation] of the logarithm"),
    "qnormal": (3, "[mean, deviation, step]"),
    "qlognormal": (3, "[mean, deviation, step] of the logarithm"),
}
_TYPES = ("choice", *_NUMBERS)


class SearchSpace:
    """What a search may vary.

    Args:
        keys: NNI's search space: ``{key: {"_type": ..., "_value": ...}}``.
        paths: Where each key stands in the document.
    """

    def __init__(self, keys: dict[str, dict[str, Any]], paths: Mapping[str, tuple[Any, ...]]) -> None:
        self.keys, self._paths = keys, paths

    @classmethod
    def read(cls, located: Located) -> SearchSpace:
        """The space under ``space`` of a document; keys may be dotted or nested, types in NNI's form or the short one.

        Raises:
            ConfigError: Naming file, line and key.
        """
        keys: dict[str, dict[str, Any]] = {}
        paths: dict[str, tuple[Any, ...]] = {}
        for path, leaf in _leaves(located.data["space"], ("space",), located):
            key = ".".join(map(str, path[1:]))
            if key in keys:
                raise located.fail(path, "stands twice")
            keys[key], paths[key] = _checked(leaf, path, located), path
        if not keys:
            raise located.fail(("space",), "needs at least one key to vary")
        return cls(keys, paths)

    def candidates(self, key: str) -> list[Any]:
        """Values to try a key with: every choice, or the ends of its range (the middle of one without ends)."""
        kind, value = self.keys[key]["_type"], self.keys[key]["_value"]
        if kind == "choice":
            return list(value)
        if kind == "randint":
            return [value[0], value[1] - 1]
        if "normal" in kind:
            return [math.exp(value[0]) if "log" in kind else value[0]]
        return [value[0], value[1]]

    def check(self, run: Mapping[str, Any], located: Located) -> Iterator[tuple[str, Any, RunSettings]]:
        """Settings of the run with each candidate of each key in turn.

        Args:
            run: The run as plain values.
            located: The document, for errors.

        Yields:
            Key, candidate and settings.

        Raises:
            ConfigError: Naming file, line, key and value, where a value is not one that the run takes, or two keys
                change the same one.
        """
        taken: dict[str, str] = {}
        for key, path in self._paths.items():
            for value in self.candidates(key):
                try:
                    changes = overrides({key: value}, run)
                    settings = with_parameters(run, {key: value})
                except ConfigError as error:
                    raise self.fail(key, value, error, located) from error
                yield key, value, settings
            for change in changes:
                target = change.partition("=")[0]
                if taken.setdefault(target, key) != key:
                    raise located.fail(path, f"{taken[target]!r} changes {target} already")

    def fail(self, key: str, value: Any, error: Exception, located: Located) -> ConfigError:
        """The error to raise about a candidate."""
        return located.fail(self._paths[key], f"{value!r} does not fit: {error}")


def _leaves(data: Any, path: tuple[Any, ...], located: Located) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if not isinstance(data, dict):
        raise located.fail(path, f"need {{choice: [...]}} or another of {', '.join(_TYPES)}, got {data!r}")
    for key, value in data.items():
        inner = (*path, key)
        if isinstance(value, dict) and not ("_type" in value or "_value" in value or _short(value)):
            yield from _leaves(value, inner, located)
        else:
            yield inner, value


def _short(value: dict[str, Any]) -> bool:
    return any(key in _TYPES for key in value)


def _checked(leaf: Any, path: tuple[Any, ...], located: Located) -> dict[str, Any]:
    """A leaf in NNI's own form."""
    if isinstance(leaf, dict) and set(leaf) == {"_type", "_value"}:
        kind, value = leaf["_type"], leaf["_value"]
    elif isinstance(leaf, dict) and len(leaf) == 1:
        ((kind, value),) = leaf.items()
    else:
        raise located.fail(path, f"need {{_type: ..., _value: [...]}} or {{choice: [...]}}, got {leaf!r}")
    if kind not in _TYPES:
        raise located.fail(path, f"unknown type {kind!r} (allowed: {', '.join(_TYPES)})")
    if not isinstance(value, list) or not value:
        raise located.fail(path, f"{kind} needs a list of values, got {value!r}")
    if kind == "choice":
        if any(isinstance(item, dict) for item in value):
            raise located.fail(path, "a choice between tables is not supported; vary their keys")
        if len({json.dumps(item) for item in value}) < len(value):
            raise located.fail(path, f"choice has a value twice: {value!r}")
        return {"_type": kind, "_value": value}
    count, form = _NUMBERS[kind]
    numbers = all(map(is_whole if kind == "randint" else is_number, value))
    if len(value) != count or not numbers or not _ordered(kind, value):
        raise located.fail(path, f"{kind} needs {form}, got {value!r}")
    return {"_type": kind, "_value": value}


def _ordered(kind: str, value: list[float]) -> bool:
    if kind.startswith("q") and not value[2] > 0:
        return False
    if "normal" in kind:
        return value[1] > 0
    return value[0] < value[1] and (value[0] > 0 or "log" not in kind)


def overrides(parameters: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """The ``--set`` of ``gblr run`` that parameters of a trial mean.

    Args:
        parameters: Values by key of the space; ``*`` in a key stands for every entry of a list.
        run: The run that they change.

    Raises:
        ConfigError: If a key leads nowhere, or a budget is out of range.
    """
    changes: list[str] = []
    for key, value in parameters.items():
        target = ALIASES.get(key, key)
        if key == "budget" and run.get("config_list") is not None:
            check_share("budget", value, "relative FLOPs")
            target, value = "config_list.*.sparse_ratio", round(1.0 - value, 12)
        text = json.dumps(value, ensure_ascii=False)
        changes += [f"{full}={text}" for full in _expanded(target.split("."), run, key)]
    return changes


def _expanded(words: list[str], data: Any, key: str) -> list[str]:
    if "*" not in words:
        return [".".join(words)]
    at = words.index("*")
    for word in words[:at]:
        data = data.get(word) if isinstance(data, Mapping) else None
    if not isinstance(data, list):
        raise ConfigError(f"{key}: the run has no {'.'.join(words[:at])} to put it into")
    rest = [_expanded(words[at + 1 :], entry, key) for entry in data]
    return [".".join([*words[:at], str(index), end]) for index, ends in enumerate(rest) for end in ends]


def with_parameters(run: Mapping[str, Any], parameters: Mapping[str, Any]) -> RunSettings:
    """Settings of a run, changed by the parameters of a trial.

    Raises:
        ConfigError: If a parameter is none that the run has, or has a value that it does not take.
    """
    located = Located("run", copy.deepcopy(dict(run)), {})
    parse_overrides(located, overrides(parameters, run))
    located.places.clear()  # the key is named anyway
    return read_settings(RunSettings, located)
