"""Tasks that ``gblr run`` can train: a Lightning module and its data, chosen by name or import path."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import ConfigError

__all__ = ["TASKS", "get_task"]

TASKS = {
    "digits_vit": ("gblr_plugin.tasks.digits", "DigitsTask"),
    "byte_gpt": ("gblr_plugin.tasks.text", "TextTask"),
    "vit": ("gblr_plugin.tasks.images", "ViTTask"),
    "mixer": ("gblr_plugin.tasks.images", "MixerTask"),
    "resnet": ("gblr_plugin.tasks.images", "ResNetTask"),
    "gpt2": ("gblr_plugin.tasks.language", "GPT2Task"),
    "bert": ("gblr_plugin.tasks.language", "BertTask"),
}
_METHODS = ("network", "module", "data", "example_input")


def get_task(name: str) -> Any:
    """The task class called ``name``: one of :data:`TASKS`, or ``"package.module:Class"`` for a user's own.

    Raises:
        ConfigError: If there is no such task.
    """
    if name in TASKS:
        module, attribute = TASKS[name]
    elif ":" in name:
        module, _, attribute = name.partition(":")
    else:
        raise ConfigError(f"task: unknown task {name!r}; allowed are {', '.join(TASKS)} or 'package.module:Class'")
    try:
        found = import_module(module)
    except (ImportError, ValueError, SyntaxError) as error:
        raise ConfigError(f"task: cannot import {module!r}: {error}") from error
    kind = getattr(found, attribute, None)
    if not isinstance(kind, type):
        raise ConfigError(f"task: {module!r} has no class {attribute!r}")
    # Before it is called with the config's arguments, which another class may take for a command.
    missing = next((method for method in _METHODS if not callable(getattr(kind, method, None))), None)
    if missing is not None:
        raise ConfigError(f"task: {name!r} is no task, it has no method {missing!r} (need {', '.join(_METHODS)})")
    return kind
