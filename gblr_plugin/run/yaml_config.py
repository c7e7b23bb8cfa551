"""YAML into typed settings: every key is known, typed and range-checked; errors name file, line and key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from ..errors import ConfigError

__all__ = ["load_yaml", "parse_overrides", "read_settings"]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 20

T = TypeVar("T")


class _Located:
    """A parsed YAML document that remembers on which line each key stands."""

    def __init__(self, source: str, data: Any, lines: dict[tuple[Any, ...], int]) -> None:
        self.source, self.data, self.lines = source, data, lines

    def where(self, path: tuple[Any, ...]) -> str:
        """``file:line: key``, as far as known."""
        line = next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        place = self.source if line is None else f"{self.source}:{line}"
        key = ".".join(map(str, path))
        return f"{place}: {key}" if key else place

    def fail(self, path: tuple[Any, ...], message: str) -> ConfigError:
        return ConfigError(f"{self.where(path)}: {message}")


def load_yaml(path: str | Path) -> _Located:
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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    lines: dict[tuple[Any, ...], int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _walk(node, (), lines, str(path))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    return _Located(str(path), data, lines)


def _walk(node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], source: str) -> None:
    if len(path) > _MAX_DEPTH:
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            if inner in lines:
                raise ConfigError(f"{source}:{key.start_mark.line + 1}: key {key.value!r} stands twice")
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _walk(value, (*path, index), lines, source)


def parse_overrides(located: _Located, overrides: list[str]) -> None:
    """Apply ``--set key.sub=value`` in order; values are YAML.

    Raises:
        ConfigError: If an override has no ``=``, a path leads through a scalar, or a value is not valid YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: need key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML") from error
        target = located.data
        *parents, last = key.split(".")
        for part in parents:
            target = _descend(target, part, override)
        if isinstance(target, list):
            target[_index(target, last, override)] = value
        elif isinstance(target, dict):
            target[last] = value
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parents)} is not a table")


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(f"--set {override}: {part!r} is no index of a list of {len(target)}")
    return int(part)


def _descend(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if not isinstance(target, dict):
        raise ConfigError(f"--set {override}: {part!r} is inside a value that is not a table")
    return target.setdefault(part, {})


def read_settings(kind: type[T], located: _Located) -> T:
    """Build a dataclass from a parsed document, checking every key and type.

    Raises:
        ConfigError: Naming file, line, key and what is allowed.
    """
    settings: T = _build(kind, located.data, (), located)
    return settings


def _build(kind: Any, data: Any, path: tuple[Any, ...], located: _Located) -> Any:
    if not isinstance(data, dict):
        raise located.fail(path, f"need a table, got {_describe(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
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
        raise located.fail(path, str(error)) from error


def _convert(hint: Any, value: Any, path: tuple[Any, ...], located: _Located) -> Any:
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
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as text
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise located.fail(path, f"need {_NAMES.get(hint, hint)}, got {_describe(value)}")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{_NAMES.get(type(value), type(value).__name__)} {text if len(text) < 40 else text[:37] + '...'}"
