"""Decides which layers of a model are structured, and gives the reason for each layer that stays dense.

All functions that compress a model use this policy. Users ask for layers by patterns (:mod:`.patterns`), or for all
layers. Layers that cannot be structured, layers whose weight is tied to another, and output heads stay dense and are
listed with the reason. An output head that is asked for by its full name is structured; to name a tied layer, or one
that cannot be structured, is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..layers import StructuredLayer
from ..layers.attention import ProjectedAttention
from ..layers.dense import can_gain, check_structurable, obstacle
from ..layers.separation import attention_of, is_packed, separated
from .heads import output_heads
from .matrices import WeightMatrix, weight_matrices
from .patterns import as_patterns, check_used, matches
from .ties import check_untied, tied_layers

__all__ = ["LayerFilter", "Pattern", "Selection", "Skipped", "choose", "layer_filter", "log_skipped", "select_layers"]

Pattern = str | type[nn.Module]
"""A full name, a glob pattern over full names, a type's name, or a type."""

HEAD = "it is an output head; give its full name to structure it too"
SMALL = "it is too small to gain from structure"
PACKED = (
    "attention packs its projections in one parameter; gblr_plugin.layers.separation.separate(model), called before "
    "the optimizer is made, turns them into layers"
)

_ALLOWED = "allowed are Linear, Conv1d, Conv2d and Hugging Face Conv1D"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A weight that was asked for and stays dense.

    Args:
        name: Name of the layer, or of a parameter of a module that is no layer.
        reason: Why, as the end of a message.
        share: The weight's share of the entries of all weight matrices of the model, which is its share of the
            multiply-adds if each is applied to one position. :func:`gblr_plugin.report` counts with an input.
    """

    name: str
    reason: str
    share: float


@dataclass(frozen=True)
class Selection:
    """The layers of a model to structure, and the weights that were asked for and stay dense.

    Args:
        layers: Modules to structure by name, in the model's order; a module that appears twice has its first name.
        skipped: Weights that stay dense, in the model's order.
    """

    layers: dict[str, nn.Module]
    skipped: list[Skipped]


class Policy:
    """Decides which weights of a model stay dense unless they are asked for by their full names.

    Args:
        model: Only looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tied, self._heads = tied_layers(model), output_heads(model)
        packed: list[Any] = [module for module in model.modules() if is_packed(module)]
        self._packed = {id(module) for attention in packed for module in (attention, attention.out_proj)}

    def reason(self, matrix: WeightMatrix) -> str | None:
        """Say why a weight stays dense; ``None`` if it can be structured."""
        module = matrix.module
        parameter = module._parameters.get(matrix.parameter)
        if parameter is not None and matrix.parameter != "weight" and parameter.dim() == 3:
            return f"a {type(module).__name__} holds the matrices of several experts in one parameter"
        if id(module) in self._packed:
            return PACKED
        found = obstacle(module) or self._tied.get(id(module))
        return HEAD if found is None and id(module) in self._heads else found

    def default(self, matrix: WeightMatrix) -> str | None:
        """Say why a weight stays dense that nobody asked for: then also if it is too small to gain."""
        reason = self.reason(matrix)
        return SMALL if reason is None and not can_gain(matrix.module) else reason


def choose(
    model: nn.Module,
    wanted: Callable[[str, nn.Module], bool],
    named: Collection[str] = (),
    *,
    default: bool = False,
) -> Selection:
    """Apply the policy to what is asked for.

    Args:
        model: Only looked at.
        wanted: Whether a module is asked for; takes its (first) name and itself.
        named: Full (first) names of layers that are asked for.
        default: Whether nobody asked for anything: layers too small to gain are then left out too. Otherwise they are
            left to the caller, who knows into how many matrices their rows are split.

    Raises:
        ConfigError: If a layer that is asked for by its full name cannot be structured, or its weight is tied.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    chosen = {name: modules[name] for name in named}
    for name, module in chosen.items():
        check_structurable(module, name)
    check_untied(model, chosen)
    policy = Policy(model)
    matrices = list(weight_matrices(model))
    total = sum(matrix.entries for matrix in matrices)
    first_names = {id(module): name for name, module in modules.items()}
    skipped = []
    for matrix in matrices:
        owner = first_names.get(id(matrix.module), "")
        if owner in chosen or not owner or not wanted(owner, matrix.module):
            continue
        reason = policy.default(matrix) if default else policy.reason(matrix)
        if reason is None:
            chosen[owner] = matrix.module
        else:
            skipped.append(Skipped(matrix.name, reason, matrix.entries / total if total else 0.0))
    return Selection({name: chosen[name] for name in modules if name in chosen}, skipped)


class _Request:
    """The patterns of what a user asks for, read against a model; patterns that mean attention mean its projections."""

    def __init__(self, model: nn.Module, include: Iterable[Pattern] | None, exclude: Iterable[Pattern]) -> None:
        modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        self._attention = attention_of(model)
        self._names: dict[int, list[str]] = {}
        for name, module in modules.items():
            self._names.setdefault(id(module), []).append(name)
        self._include = None if include is None else as_patterns("layers: include", include)
        self._exclude = as_patterns("layers: exclude", exclude)
        check_used("layers", [*(self._include or ()), *self._exclude], modules, "module of the model")
        self.default = self._include is None
        given = [p for p in self._include or () if p in modules and not isinstance(modules[p], ProjectedAttention)]
        asked = {self._names[id(modules[p])][0]: modules[p] for p in given}
        self.named = [name for name, module in asked.items() if not self._matches(self._exclude, module)]
        owners = [matrix.module for matrix in weight_matrices(model)]
        for pattern in self._include or ():
            if pattern not in given and not any(self._matches([pattern], owner) for owner in owners):
                raise ConfigError(f"layers: pattern {pattern!r} matches no layer that can be structured; {_ALLOWED}")

    def _matches(self, patterns: Iterable[str], module: nn.Module) -> bool:
        meant = [module, *self._attention.get(id(module), ())]
        return any(
            matches(pattern, name, each) for pattern in patterns for each in meant for name in self._names[id(each)]
        )

    def __call__(self, name: str, module: nn.Module) -> bool:
        return (self._include is None or self._matches(self._include, module)) and not self._matches(
            self._exclude, module
        )


def select_layers(
    model: nn.Module, include: Iterable[Pattern] | None = None, exclude: Iterable[Pattern] = ()
) -> Selection:
    """Choose the dense layers of a model that are to be structured.

    Args:
        model: Only looked at. Of attention with packed projections the layers are chosen that
            :func:`~gblr_plugin.layers.separation.separated` makes of them; whoever replaces layers calls this within
            that context.
        include: Full names, glob patterns over names (``"blocks.*.mlp.*"``), or types and their names
            (``"Linear"``), which mean subclasses too. ``None``: every layer that can be structured and made cheaper.
        exclude: Patterns of the same kinds; layers that match them are not chosen.

    Returns:
        The layers, and what was asked for and stays dense: what cannot be structured, what is tied, output heads.

    Raises:
        ConfigError: If a pattern matches nothing, a layer named in full cannot be structured or is tied, or nothing is
            left.
    """
    with separated(model):
        request = _Request(model, include, exclude)
        selection = choose(model, request, request.named, default=request.default)
    if not selection.layers:
        if selection.skipped:
            largest = max(selection.skipped, key=lambda skipped: skipped.share)
            reason = f"layer {largest.name!r}: {largest.reason}"
        else:
            reason = f"{_ALLOWED}, inside a model"
        raise ConfigError(f"layers: the selection is empty; {reason}")
    return selection


class LayerFilter:
    """A ``filter_fn`` for torchao's ``quantize_``, see :func:`layer_filter`."""

    def __init__(self, model: nn.Module, include: Iterable[Pattern] | None, exclude: Iterable[Pattern]) -> None:
        with separated(model):
            self._request = _Request(model, include, exclude)
            self.selection = choose(model, self._request, self._request.named, default=self._request.default)
        present = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.selection.layers}
        self._packed = {name: module for name, module in present.items() if is_packed(module)}
        chosen = {name: module for name, module in self.selection.layers.items() if name not in self._packed}
        self._passed = {id(module): module for module in (*chosen.values(), *self._packed.values())}

    def __call__(self, module: nn.Module, name: str) -> bool:
        """Whether a layer was chosen, attention has chosen projections, or a layer asked for was prepared before."""
        return id(module) in self._passed or (isinstance(module, StructuredLayer) and self._request(name, module))

    def projections(self, attention: nn.Module) -> list[str]:
        """Names, within attention with packed projections, of those that were chosen."""
        return [name.rpartition(".")[2] for name, module in self._packed.items() if module is attention]


def layer_filter(
    model: nn.Module, include: Iterable[Pattern] | None = None, exclude: Iterable[Pattern] = ()
) -> LayerFilter:
    """Make a ``filter_fn`` for torchao's ``quantize_`` that passes the layers of :func:`select_layers`.

    Args:
        model: The model that ``quantize_`` is given as well; layers of it that are prepared already pass too.
        include: As :func:`select_layers` takes it.
        exclude: The same.

    Raises:
        ConfigError: As :func:`select_layers`, except that nothing may be left.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 32))
        >>> [name for name, module in model.named_modules() if layer_filter(model, ["Conv2d"])(module, name)]
        ['0']
    """
    return LayerFilter(model, include, exclude)


def log_skipped(skipped: Iterable[Skipped]) -> None:
    """Warn in one line per reason which weights stay dense, and of their share of the multiply-adds."""
    groups: dict[str, list[Skipped]] = {}
    for weight in skipped:
        groups.setdefault(weight.reason, []).append(weight)
    for reason, group in groups.items():
        names = group[0].name if len(group) == 1 else f"{len(group)} layers, {group[0].name} to {group[-1].name}"
        share = sum(weight.share for weight in group)
        _logger.warning("left dense: %s (%.1f%% of the multiply-adds of one position): %s", names, 100 * share, reason)
