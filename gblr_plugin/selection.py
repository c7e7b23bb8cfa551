"""Choose layers of a model by name, glob pattern or type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError
from .frozen import FROZEN
from .layers import GBLRLayer
from .swap import can_gain, check_structurable, structurable

__all__ = ["select_layers"]

_ALLOWED = "allowed are Linear, Conv1d, Conv2d and Hugging Face Conv1D"


def _is_plain(module: nn.Module) -> bool:
    """Structurable as it stands: no groups, no parametrization, not converted or quantized already."""
    weight: Any = module._parameters.get("weight") if structurable(module) else None
    return weight is not None and type(weight.data) is Tensor and getattr(module, "groups", 1) == 1


def _obstacle(modules: dict[str, nn.Module]) -> str:
    """Why none of these modules can be chosen, told by the first that comes close."""
    for name, module in modules.items():
        if isinstance(module, GBLRLayer):
            return f"layer {name!r} is structured already"
        if structurable(module) or isinstance(module, FROZEN):
            try:
                check_structurable(module, name)
            except ConfigError as error:
                return str(error)
            return f"layer {name!r} is too small to gain from structure"
    return f"{_ALLOWED}, inside a model"


def select_layers(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Dense layers of a model that are to be structured.

    Args:
        model: Any model.
        include: Module names, glob patterns over names (``"blocks.*.mlp.*"``) or type names (``"Linear"``). ``None``:
            every layer that can be structured and made cheaper.
        exclude: The same kinds of patterns, taken away again.

    Returns:
        Module by name, in the model's order; a module that appears twice has its first name.

    Raises:
        ConfigError: If a pattern matches nothing, a module named in full cannot be structured, or nothing is left.
    """
    if isinstance(include, str) or isinstance(exclude, str):
        raise ConfigError("layers: include and exclude are lists of patterns, not one string")
    modules = {name: module for name, module in model.named_modules() if name}
    first_names = {id(module): name for name, module in modules.items()}
    aliases = {name: first_names[id(module)] for name, module in model.named_modules(remove_duplicate=False) if name}

    def matches(pattern: str, name: str, module: nn.Module) -> bool:
        return fnmatchcase(name, pattern) or type(module).__name__ == pattern

    def check(pattern: str) -> None:
        if not any(matches(pattern, name, module) for name, module in modules.items()):
            near = difflib.get_close_matches(pattern, modules, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"layers: {pattern!r} matches no module of the model{hint}")

    exclude = [aliases.get(pattern, pattern) for pattern in exclude]
    for pattern in exclude:
        check(pattern)
    if include is None:
        chosen = {name: module for name, module in modules.items() if _is_plain(module) and can_gain(module)}
    else:
        include = [aliases.get(pattern, pattern) for pattern in include]
        chosen = {}
        for pattern in include:
            check(pattern)
            if pattern in modules:
                check_structurable(modules[pattern], pattern)
            elif not any(structurable(mod) and matches(pattern, name, mod) for name, mod in modules.items()):
                raise ConfigError(f"layers: {pattern!r} matches no layer that can be structured; {_ALLOWED}")
        for name, module in modules.items():
            exact = name in include
            if exact or (structurable(module) and any(matches(pattern, name, module) for pattern in include)):
                chosen[name] = module
    kept = {n: mod for n, mod in modules.items() if not any(matches(pattern, n, mod) for pattern in exclude)}
    chosen = {n: mod for n, mod in chosen.items() if n in kept and not isinstance(mod, GBLRLayer)}
    if not chosen:
        raise ConfigError(f"layers: the selection is empty; {_obstacle(kept)}")
    return chosen
