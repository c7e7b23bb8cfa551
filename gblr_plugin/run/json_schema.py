"""The JSON schema of a config, made of the dataclass of its settings: types, ranges, defaults, and what keys mean."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Annotated, Any, Union

from ..utils.declared import bounds_of

__all__ = ["json_schema"]

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}
_ROLE = re.compile(r":\w+:`(?:~?(?:[\w.]+\.)?)([^`]+)`")  # of Sphinx


def json_schema(kind: type) -> dict[str, Any]:
    """The schema of a table, as editors read it (draft 2020-12).

    Args:
        kind: A dataclass; one field is one key.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_table(kind)}


def _table(kind: Any) -> dict[str, Any]:
    hints, meanings = typing.get_type_hints(kind, include_extras=True), _meanings(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        schema = _schema(hints[field.name])
        if field.name in meanings:
            schema["description"] = meanings[field.name]
        if field.default is not dataclasses.MISSING:
            schema["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            schema["default"] = _plain(field.default_factory())
        else:
            required.append(field.name)
        properties[field.name] = schema
    summary = _text(inspect.getdoc(kind) or "").split("\n\n")[0]
    table = {"type": "object", "description": summary, "properties": properties, "additionalProperties": False}
    return {**table, "required": required} if required else table


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = {key: value for bound in bounds_of(hint) for key, value in bound.to_schema().items()}
        return {**_schema(arguments[0]), **bounds}
    if origin in (Union, types.UnionType):
        kinds = [_schema(argument) for argument in arguments if argument is not type(None)]
        return {"anyOf": [*kinds, {"type": "null"}]}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if dataclasses.is_dataclass(hint):
        return _table(hint)
    return {"type": _TYPES[hint]} if hint in _TYPES else {}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _meanings(kind: type) -> dict[str, str]:
    """The text of each argument in a docstring of Google's style."""
    lines = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        begun = re.match(r" {4}(\w+): (.*)", line)
        if begun:
            name, found[begun[1]] = begun[1], begun[2]
        elif name:
            found[name] += " " + line.strip()
    return {name: _text(text) for name, text in found.items()}


def _text(text: str) -> str:
    """A docstring without the marks of its markup."""
    return _ROLE.sub(r"\1", text).replace("``", "`")
