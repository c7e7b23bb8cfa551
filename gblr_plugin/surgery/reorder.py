"""Reorders the hidden units of a model so that similar units are neighbours, without changing what the model computes.

Blocks on intervals approximate the reordered weights with a smaller error, at the same multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..layers.dense import weight_matrix
from ..utils.running import run_example
from .selection import select_layers
from .ties import check_untied

__all__ = ["Pair", "reorder", "similar_order"]

Pair = tuple[str | Sequence[str], str]
"""Layers that make hidden units (of gated networks several), and the layer that takes them; names or glob patterns."""

TOLERANCE = 1e-3
"""Largest change of an output, relative to its largest entry, that rounding in another order may make."""


@dataclass(frozen=True)
class _Units:
    """Hidden units: the rows of the layers that make them, and the columns of the layer that takes them."""

    makers: dict[str, nn.Module]
    taker: str
    module: nn.Module

    def features(self) -> list[Tensor]:
        """The weights of each layer with the units along the first axis, (h, ...) each."""
        return [*map(weight_matrix, self.makers.values()), weight_matrix(self.module).T]

    def permute(self, order: Tensor) -> None:
        for maker in self.makers.values():
            weight, bias = weight_matrix(maker), getattr(maker, "bias", None)
            weight.copy_(weight[order])
            if bias is not None:
                bias.detach().copy_(bias.detach()[order])
        weight = weight_matrix(self.module)
        weight.copy_(weight[:, order])


def similar_order(features: Sequence[Tensor]) -> Tensor:
    """Order units along the Fiedler vector of their similarity, so that neighbours are alike.

    The similarity of two units is the sum over the features of their squared cosine; the vector is the eigenvector of
    the second smallest eigenvalue of its normalised Laplacian (Shi & Malik 2000), which places units on a line so that
    similar ones are close. O(h^3) time, O(h^2) memory.

    Args:
        features: (h, ...) each, floating point.

    Returns:
        (h,) int64, the unit to take for each place.
    """
    count = len(features[0])
    similarity = torch.zeros(count, count, dtype=torch.float64, device=features[0].device)
    for feature in features:
        flat = feature.detach().flatten(1).double()
        direction = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-30)
        similarity += (direction @ direction.T).square()
    similarity.fill_diagonal_(0)
    scale = similarity.sum(1).clamp(min=1e-30).rsqrt()
    laplacian = torch.eye(count, dtype=scale.dtype, device=scale.device) - scale[:, None] * similarity * scale
    place = scale * torch.linalg.eigh(laplacian)[1][:, min(1, count - 1)]
    return torch.argsort(place, stable=True)


@torch.no_grad()
def reorder(model: nn.Module, pairs: Iterable[Pair], *, example_input: Any = None) -> dict[str, Tensor]:
    """Reorder hidden units in place, so that blocks on intervals fit better; the model computes the same as before.

    The rows (and biases) of the layers that make the units and the columns of the layer that takes them get the same
    permutation. The model computes the same if only functions of single units lie between, such as ReLU, GELU, dropout,
    or the product with a gate that is permuted too. A norm, a convolution, attention heads or a reshape are no such
    functions. With ``example_input`` outputs are compared, and a pair that changes them is refused.

    Args:
        model: Dense model, before it is structured and before an optimizer holds state for its parameters.
        pairs: Makers and taker of hidden units, by name or glob pattern: ``("blocks.*.fc1", "blocks.*.fc2")``, or
            ``(["*.gate_proj", "*.up_proj"], "*.down_proj")``. Patterns of a pair must match equally many layers.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments: outputs are compared
            before and after each pair.

    Returns:
        The order of each taker's units, (h,) int64, by the taker's name.

    Raises:
        ConfigError: If layers do not fit together, are tied, or the outputs change; the model is then as it was.
    """
    chosen = [units for pair in pairs for units in _units(model, pair)]
    made = [name for units in chosen for name in units.makers]
    taken = [units.taker for units in chosen]
    for names, side in ((made, "rows"), (taken, "columns")):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"reorder: the {side} of {twice!r} are reordered by two pairs")
    orders: dict[str, Tensor] = {}
    expected = None if example_input is None else _outputs(model, example_input)
    for units in chosen:
        order = similar_order(units.features())
        units.permute(order)
        orders[units.taker] = order
        change = 0.0 if expected is None else _change(expected, _outputs(model, example_input))
        if not change <= TOLERANCE:
            for done in chosen[: len(orders)]:
                done.permute(torch.argsort(orders[done.taker]))
            between = f"between {', '.join(map(repr, units.makers))} and {units.taker!r}"
            raise ConfigError(
                f"reorder: the model's output changes by {change:.2g} of its largest entry, so that {between} lies "
                "more than functions of single units; leave this pair out"
            )
    return orders


def _units(model: nn.Module, pair: Pair) -> list[_Units]:
    """Look up the hidden units that a pair of patterns names."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], str):
        raise ConfigError(f"reorder: a pair is (maker or list of makers, taker), got {pair!r}")
    patterns = [pair[0]] if isinstance(pair[0], str) else list(pair[0])
    makers = [select_layers(model, [pattern]).layers for pattern in patterns]
    takers = select_layers(model, [pair[1]]).layers
    for pattern, found in zip(patterns, makers, strict=True):
        if len(found) != len(takers):
            raise ConfigError(
                f"reorder: {pattern!r} matches {len(found)} layers and {pair[1]!r} {len(takers)}; need as many"
            )
        check_untied(model, found)
    check_untied(model, takers)
    result = []
    for index, (taker, module) in enumerate(takers.items()):
        group = dict(list(found.items())[index] for found in makers)
        for name, layer in {**group, taker: module}.items():
            if layer.weight.dim() != 2:  # type: ignore[operator]  # a tensor
                raise ConfigError(f"reorder: {name!r} is a {type(layer).__name__}; need linear layers")
        width = weight_matrix(module).shape[1]
        for name, layer in group.items():
            if layer is module or len(weight_matrix(layer)) != width:
                made = len(weight_matrix(layer))
                raise ConfigError(f"reorder: {name!r} makes {made} units and {taker!r} takes {width}; need as many")
        result.append(_Units(group, taker, module))
    return result


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    """Return the floating point tensors that a model gives in evaluation mode."""
    leaves = tree_leaves(run_example(model, example_input))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of an output over its largest entry."""
    changes = [
        float((b - a).abs().max() / a.abs().max().clamp(min=1e-30))
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return max(changes, default=0.0)
