"""Makes layers of weights that a module packs, so that each is selected, structured and converted like any layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import PROJECTIONS, ProjectedAttention, take_projections
from .dense import replace_modules

__all__ = ["attention_of", "is_packed", "separate", "separated"]


def is_packed(module: nn.Module) -> bool:
    """Whether a module is attention with packed projections, of plain weights, that can become layers.

    A subclass cannot, since it may compute something else.
    """
    if type(module) is not nn.MultiheadAttention or parametrize.is_parametrized(module):
        return False
    weights: Any = [*module._parameters.values(), module.out_proj._parameters.get("weight")]
    return all(weight is None or (type(weight.data) is Tensor and weight.is_floating_point()) for weight in weights)


def attention_of(model: nn.Module) -> dict[int, list[ProjectedAttention]]:
    """The attention that a layer projects for, by ``id`` of the layer."""
    found: dict[int, list[ProjectedAttention]] = {}
    for module in model.modules():
        if isinstance(module, ProjectedAttention):
            for name in PROJECTIONS:
                found.setdefault(id(getattr(module, name)), []).append(module)
    return found


def separate(model: nn.Module, names: Iterable[str] | None = None) -> dict[int, tuple[Any, ProjectedAttention]]:
    """Turn attention with packed projections into attention with linear layers, in place; it computes the same.

    :func:`gblr_plugin.prepare` and all else that compresses models does so itself. Call it before an optimizer is made
    that must know the layers' parameters beforehand, as NNI's evaluators do.

    Args:
        model: Changed in place; the parameters of ``nn.MultiheadAttention`` are new ones.
        names: Names of tensors of the separated model: only attention whose layers are among them is changed.

    Returns:
        By ``id`` of the new module, the module that it replaces, and itself.
    """
    wanted = None if names is None else {name.rpartition(".")[0] for name in names}
    changed: dict[int, tuple[Any, ProjectedAttention]] = {}
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        chosen = wanted is None or any(f"{name}.{layer}" in wanted for layer in PROJECTIONS[:3])
        if name and chosen and is_packed(module):
            attention: Any = module
            layers = ProjectedAttention(attention)
            replacements[id(module)], changed[id(layers)] = layers, (module, layers)
    replace_modules(model, replacements)
    return changed


@contextmanager
def separated(model: nn.Module) -> Iterator[None]:
    """Make layers of the projections of attention for a time; where none was structured, they are packed again.

    Args:
        model: Changed in place.
    """
    changed = separate(model)
    try:
        yield
    finally:
        present = {id(module) for module in model.modules()}
        replace_modules(
            model,
            {
                key: take_projections(attention, layers)
                for key, (attention, layers) in changed.items()
                if key in present and not _is_structured(layers)
            },
        )


def _is_structured(attention: ProjectedAttention) -> bool:
    layers: list[Any] = [getattr(attention, name) for name in PROJECTIONS]
    return any(type(layer) is not nn.Linear or type(layer.weight.data) is not Tensor for layer in layers)
