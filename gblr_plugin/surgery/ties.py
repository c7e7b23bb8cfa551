"""Finds weights that several layers share, since a structured layer would silently stop sharing its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["check_untied", "tied_layers"]


def tied_layers(model: nn.Module) -> dict[int, str]:
    """Find the modules whose weight or bias is also a parameter of another module.

    That is the same parameter, or another in the same memory. A module that is used twice is no such module.

    Args:
        model: Only looked at.

    Returns:
        By ``id`` of the module, what it shares, as part of a message.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    regions: list[tuple[tuple[Any, int, int], str, nn.Module]] = []
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
                if (region := _region(parameter)) is not None:
                    regions.append((region, name, module))
    before: list[tuple[tuple[Any, int, int], str, nn.Module]] = []
    found: dict[int, str] = {}
    for region, name, module in sorted(regions, key=lambda entry: (str(entry[0][0]), *entry[0][1:])):
        device, begin, _ = region
        before = [entry for entry in before if entry[0][0] == device and entry[0][2] > begin]
        for _, other_name, other in before:
            if other is not module:
                found.setdefault(id(module), f"it shares memory with a parameter of {other_name!r}")
                found.setdefault(id(other), f"it shares memory with a parameter of {name!r}")
        before.append((region, name, module))
    for key in ("bias", "weight"):  # if a layer shares both, the message names the weight
        for module in model.modules():
            parameter = module._parameters.get(key)
            others = [other for other, holder in owners.get(id(parameter), ()) if holder is not module]
            if parameter is not None and others:
                found[id(module)] = f"its {key} is tied to that of {others[0]!r}"
    return found


def check_untied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight or bias is that of another module too.

    Args:
        model: The whole model.
        chosen: Layers by name.

    Raises:
        ConfigError: If one is; it names both.
    """
    tied = tied_layers(model)
    for name, module in chosen.items():
        if id(module) in tied:
            raise ConfigError(f"layer {name!r}: {tied[id(module)]}; untie it or leave it out")


def _region(parameter: Tensor) -> tuple[torch.device, int, int] | None:
    """Device, begin and end of the memory that a plain tensor without gaps fills; ``None`` for other tensors."""
    if type(parameter.data) is not Tensor or parameter.is_meta or not parameter.numel():
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if span != parameter.numel():
        return None
    begin = parameter.data_ptr()
    return parameter.device, begin, begin + span * parameter.itemsize
