"""Dense layers: which of them can be structured, their weights as matrices, and their replacement by other modules."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ConfigError
from ..matrix.structure import StructuredMatrix
from ..tensor.frozen import FROZEN
from . import GBLRConv1d, GBLRConv2d, GBLRLayer, GBLRLinear, StructuredLayer
from .full import FULL

__all__ = [
    "KINDS",
    "can_gain",
    "check_structurable",
    "hooks_of",
    "layer_for",
    "obstacle",
    "replace_modules",
    "stored_weight",
    "structurable",
    "structured_like",
    "take_flags",
    "weight_matrix",
]

_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
"""Attributes in which torch keeps the hooks of a module, of every kind."""


def _is_hf_conv1d(module: nn.Module) -> bool:
    """Recognise Hugging Face's ``Conv1D``, a linear layer whose weight is (in, out), without importing its package."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Types of layers that can be structured, beside Hugging Face's ``Conv1D``."""


def structurable(module: nn.Module) -> bool:
    """Whether the type of a module can be structured; a subclass cannot, since it may compute something else."""
    return type(module) in KINDS or _is_hf_conv1d(module)


def can_gain(module: nn.Module, row_splits: int = 1) -> bool:
    """Whether one full rank-1 component per split costs less than the dense product: m + s n < m n."""
    m, n = weight_matrix(module).shape
    return m + row_splits * n < m * n


def obstacle(module: nn.Module) -> str | None:
    """Say why a layer cannot be structured as it stands, as the end of a message; ``None`` if it can.

    The entries of its weight are not checked.
    """
    kind = type(module).__name__
    computed = isinstance(module.__dict__.get("weight"), Tensor)  # the old weight_norm and spectral_norm
    if computed or parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if isinstance(module, FROZEN):
        return "it is converted already"
    if isinstance(module, StructuredLayer):
        return "it is structured already"
    if isinstance(module, FULL):
        return "it is converted already, and stored dense"
    if not structurable(module):
        base = next((base.__name__ for base in KINDS if isinstance(module, base)), None)
        return f"a {kind} cannot be structured" + (f": as a subclass of {base} it may compute more" if base else "")
    if getattr(module, "groups", 1) != 1:
        return f"convolution with groups={module.groups}: only groups=1 can be structured"
    weight: Any = module.weight
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, need a plain tensor"
    if not weight.dtype.is_floating_point:
        return f"its weight has dtype {weight.dtype}, need a floating point one"
    if weight.dtype.itemsize < 2:
        return f"its weight has dtype {weight.dtype}, need half precision or more"
    return None


def check_structurable(module: nn.Module, name: str) -> None:
    """Refuse a layer that cannot be structured as it stands.

    Raises:
        ConfigError: With the layer's name, if it cannot be, or its weight has NaN or infinite entries.
    """
    reason = obstacle(module)
    if reason is not None:
        allowed = "; allowed are Linear, Conv1d, Conv2d and Hugging Face Conv1D" if "cannot" in reason else ""
        raise ConfigError(f"layer {name!r}: {reason}{allowed}")
    weight: Any = module.weight
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        raise ConfigError(f"layer {name!r}: its weight has NaN or infinite entries")


def weight_matrix(module: nn.Module) -> Tensor:
    """View the weight of a layer as an (m, n) matrix; of a convolution as (c_out, c_in * prod(kernel))."""
    stored: Any = module.weight
    weight: Tensor = stored.detach()
    return weight.T if _is_hf_conv1d(module) else weight.flatten(1)


def stored_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """Bring an (m, n) matrix into the shape, layout and dtype in which a layer stores its weight."""
    weight: Any = module.weight
    return (matrix.T.contiguous() if _is_hf_conv1d(module) else matrix).reshape(weight.shape).to(weight)


def structured_like(module: nn.Module, matrix: StructuredMatrix, *, align: int | tuple[int, int] = 1) -> GBLRLayer:
    """Make a trainable structured layer to replace a dense layer.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face ``Conv1D``.
        matrix: Start of its (m, n) weight matrix.
        align: Tile of rows and columns to which intervals snap.

    Returns:
        The structured module, with the dense module's bias, dtype, device, training mode and ``requires_grad`` flags.
        :func:`replace_modules` puts it in the dense module's place, and gives it the hooks.

    Raises:
        ConfigError: If the kind of module cannot be structured.
    """
    check_structurable(module, type(module).__name__)
    weight: Any = module.weight
    layer = layer_for(module, matrix.to(device=weight.device, dtype=weight.dtype), align)
    take_flags(layer, module)
    return layer


def layer_for(module: nn.Module, matrix: StructuredMatrix, align: int | tuple[int, int] = 1) -> GBLRLayer:
    """Make the trainable layer of a module's kind, with its geometry and its bias.

    Args:
        module: A linear layer or a convolution; its weight is not looked at.
        matrix: Start of the (m, n) weight matrix, in the dtype and on the device of the layer.
        align: Tile of rows and columns to which intervals snap.
    """
    bias: Any = module.bias
    if isinstance(module, nn.Conv1d):
        return GBLRConv1d(matrix, module, bias, align=align)
    if isinstance(module, nn.Conv2d):
        return GBLRConv2d(matrix, module, bias, align=align)
    return GBLRLinear(matrix, bias, align=align)


def take_flags(layer: nn.Module, dense: nn.Module) -> None:
    """Give a layer the training mode and the ``requires_grad`` flags of the dense layer that it replaces."""
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(dense._parameters["bias" if name == "bias" else "weight"].requires_grad)  # type: ignore[union-attr]  # it has both
    layer.train(dense.training)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """Return the hooks of a module by the attributes that hold them.

    A handle that ``register_..._hook`` returned refers to these very dictionaries, so that a module which holds them
    runs the hooks until the caller removes them.
    """
    return {name: vars(module)[name] for name in _HOOKS}


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules, by identity, wherever a parent holds them; shared modules stay shared.

    The new module takes over all hooks of the old one, and the caller's handles still remove them.

    Args:
        model: Changed in place, unless it is itself replaced.
        replacements: ``id(old module)`` to new module.

    Returns:
        The model, or the module that replaces it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                parent._modules[name] = _with_hooks(replacements[id(child)], child)
    return _with_hooks(replacements[id(model)], model) if id(model) in replacements else model


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    vars(new).update(hooks_of(old))
    for hook in old._load_state_dict_pre_hooks.values():
        bound: Any = hook  # torch wraps a hook that is called with its module, to which it holds a weak reference
        if getattr(bound, "with_module", False) and bound.module() is old:
            bound.module = weakref.ref(new)
    return new
