"""YAML into typed settings: every key is known, typed and range-checked; errors name file, line and key."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from ..errors import ConfigError
from ..utils.validation import did_you_mean

__all__ = ["Located", "load_yaml", "parse_overrides", "read_settings"]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 20
_MAX_NODES = 100_000  # an alias counts as often as it is used

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it safely, but 1e-3 is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Located:
    """A parsed document that remembers where each key stands.

    Args:
        source: Name of the file.
        data: The parsed document.
        places: ``file:line`` or ``--set key=value`` by path of keys and indices.
    """

    def __init__(self, source: str, data: Any, places: dict[tuple[Any, ...], str]) -> None:
        self.source, self.data, self.places = source, data, places

    def place(self, path: tuple[Any, ...]) -> str:
        """``file:line`` of the key, or of the nearest one that holds it."""
        ends = range(len(path), -1, -1)
        return next((self.places[path[:end]] for end in ends if path[:end] in self.places), self.source)

    def where(self, path: tuple[Any, ...]) -> str:
        """``file:line: key``, as far as known."""
        key = ".".join(map(str, path))
        return f"{self.place(path)}: {_printable(key)}" if key else self.place(path)

    def fail(self, path: tuple[Any, ...], message: str) -> ConfigError:
        """The error to raise about the value at ``path``."""
        return ConfigError(f"{self.where(path)}: {_printable(message)}")


def _printable(text: str) -> str:
    """Line breaks and control characters, which keys and values may hold, as their escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def load_yaml(path: str | Path) -> Located:
    """Parse a YAML file safely.

    Raises:
        ConfigError: If it is missing, too large, too deep, uses tags or anchors that would build objects, repeats a
            key, or is not a mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes, which no config needs")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    data, places = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, got {_describe(data)}")
    return Located(str(path), data, places)


def _parse(text: str, source: str) -> tuple[Any, dict[tuple[Any, ...], str]]:
    """Values, and the place of each key."""
    places: dict[tuple[Any, ...], str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _walk(node, (), places, source)
        return yaml.load(text, Loader=_Loader), places  # a safe loader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{source}{line}: not valid YAML: {_printable(reason)}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except ConfigError:
        raise
    except ValueError as error:  # a date that does not exist, a number with too many digits
        raise ConfigError(f"{source}: not valid YAML: {_printable(str(error))}") from error


def _walk(node: yaml.Node, path: tuple[Any, ...], places: dict[tuple[Any, ...], str], source: str) -> None:
    here = f"{source}:{node.start_mark.line + 1}"
    if len(path) > _MAX_DEPTH:
        raise ConfigError(f"{here}: nested deeper than {_MAX_DEPTH} levels")
    if len(places) > _MAX_NODES:
        raise ConfigError(f"{here}: more than {_MAX_NODES} values, which no config needs")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = f"{source}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be one word, not a list or a table")
            inner = (*path, key.value)
            if inner in places:
                raise ConfigError(f"{place}: key {'.'.join(map(str, inner))!r} stands twice")
            places[inner] = place
            _walk(value, inner, places, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*path, index)
            places[inner] = f"{source}:{value.start_mark.line + 1}"
            _walk(value, inner, places, source)


def parse_overrides(located: Located, overrides: list[str]) -> None:
    """Apply ``--set key.sub=value`` in order; values are YAML.

    Raises:
        ConfigError: If an override has no ``=``, a path leads through a scalar, or a value is not valid YAML.
    """
    for given in overrides:
        key, equals, text = given.partition("=")
        override = _printable(given)  # for messages
        if not equals or not key:
            raise ConfigError(f"--set {override}: need key.sub=value")
        try:
            value, _ = _parse(text, "value")
        except ConfigError as error:
            raise ConfigError(f"--set {override}: {error}") from error
        target = located.data
        *parents, last = key.strip().split(".")
        path: tuple[Any, ...] = ()
        for word in parents:
            path = (*path, _index(target, word, override) if isinstance(target, list) else word)
            target = _descend(target, word, override)
        if isinstance(target, list):
            path = (*path, _index(target, last, override))
        elif isinstance(target, dict):
            path = (*path, last)
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parents)!r} is not a table")
        target[path[-1]] = value
        for old in [place for place in located.places if place[: len(path)] == path]:
            del located.places[old]
        located.places[path] = f"--set {override}"


def _index(target: list[Any], word: str, override: str) -> int:
    if not word.isdigit() or int(word) >= len(target):
        raise ConfigError(f"--set {override}: {word!r} is no index of a list of {len(target)}, which count from 0")
    return int(word)


def _descend(target: Any, word: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, word, override)]
    if not isinstance(target, dict):
        raise ConfigError(f"--set {override}: {word!r} is inside a value that is not a table")
    return target.setdefault(word, {})


def read_settings(kind: type[T], located: Located) -> T:
    """Build a dataclass from a parsed document, checking every key and type.

    Raises:
        ConfigError: Naming file, line, key and what is allowed.
    """
    settings: T = _build(kind, located.data, (), located)
    return settings


def _build(kind: Any, data: Any, path: tuple[Any, ...], located: Located) -> Any:
    if not isinstance(data, dict):
        raise located.fail(path, f"need a table, got {_describe(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise located.fail((*path, key), f"unknown key{hint} (allowed: {', '.join(fields)})")
    hints = typing.get_type_hints(kind)
    values = {name: _convert(hints[name], data[name], (*path, name), located) for name in data}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise located.fail(path, f"key {missing[0]!r} is missing")
    try:
        return kind(**values)
    except ConfigError as error:
        first = str(error).split()[0].rstrip(":")  # messages of range checks begin with their key
        place, prefix = located.place((*path, first)), _printable(".".join(map(str, path)))
        raise ConfigError(f"{place}: {prefix}{': ' if prefix else ''}{_printable(str(error))}") from error


def _convert(hint: Any, value: Any, path: tuple[Any, ...], located: Located) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return _convert(rest[0], value, path, located)
    if origin is list:
        if not isinstance(value, list):
            raise located.fail(path, f"need a list, got {_describe(value)}")
        return [_convert(arguments[0], item, (*path, index), located) for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise located.fail(path, f"need a table, got {_describe(value)}")
        return {str(key): _convert(arguments[1], item, (*path, key), located) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, located)
    if hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise located.fail(path, f"need {_NEEDED.get(hint, hint)}, got {_describe(value)}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "a table"}
_NEEDED = {**_NAMES, float: "a finite number"}


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{_NAMES.get(type(value), type(value).__name__)} {text if len(text) < 40 else text[:37] + '...'}"
