"""Finds the chains of blocks of a model: lists of modules each of whose hidden state is the next one's input.

Nothing is taken from names: the model is run on one batch, and what its blocks are given and return is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.dense import weight_matrix
from ..utils.running import evaluating
from .calls import Call, first_tensor, hidden_of, same, unkeepable
from .inputs import layer_inputs

__all__ = ["Chain", "bypassed", "find_chains", "recorded", "without_cache"]

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
"""Modules whose members may be blocks."""

Run = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks that follow each other.

    Args:
        model: Holds them.
        name: Of the list; empty if the model itself is the list.
        names: Full names of the blocks in the order in which they run.
    """

    model: nn.Module
    name: str
    names: tuple[str, ...]

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that have these names at present; a block that is a layer may have been replaced."""
        return [self.model.get_submodule(name) for name in self.names]

    def owner(self, layer: nn.Module) -> int | None:
        """Number of the block that holds a layer; ``None`` if none does."""
        held = (n for n, block in enumerate(self.blocks) if any(layer is module for module in block.modules()))
        return next(held, None)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Models of transformers within this context keep no keys and values, which would grow with each run of a block."""
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if hasattr(config, "use_cache")}
    kept = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = kept[key]


class _StopError(Exception):
    """Ends a forward pass once the last block has run."""


def recorded(
    blocks: Sequence[nn.Module], run: Run, *, nudge: bool = False, alone: bool = False
) -> tuple[dict[int, Tensor], dict[int, list[Call]], dict[int, Tensor]]:
    """Run the model and keep the calls of blocks.

    Args:
        blocks: Modules of the model.
        run: Runs it.
        nudge: Change what the first of them returns, to see what depends on it.
        alone: They are a chain: copy the hidden state before the first, which it may change in place, and end the pass
            after the last.

    Returns:
        By ``id`` of the block the hidden state before it, its calls, and the hidden state after it.
    """
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    calls: dict[int, list[Call]] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = first_tensor(args, kwargs)
        before[id(module)] = hidden.clone() if alone and module is blocks[0] else hidden

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        calls.setdefault(id(module), []).append(Call.of(args, kwargs, output))
        if nudge and module is blocks[0]:
            hidden = hidden_of(output)
            noise = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).reshape(hidden.shape)
            output = calls[id(module)][-1].returning(hidden + (noise * hidden.abs().mean()).to(hidden))
        after[id(module)] = hidden_of(output)
        if alone and module is blocks[-1]:
            raise _StopError
        return output

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave, with_kwargs=True) for block in blocks]
    try:
        run()
    except _StopError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return before, calls, after


@contextmanager
def bypassed(chain: Chain, calls: Sequence[Call], hidden: Tensor) -> Iterator[None]:
    """Within this context the blocks are not run: each returns ``hidden``, the state after the last one."""
    kept = {block: vars(block).get("forward") for block in chain.blocks}  # hooks of accelerate put one there
    try:
        for block, call in zip(kept, calls, strict=True):
            vars(block)["forward"] = lambda *_args, _call=call, **_kwargs: _call.returning(hidden)
        yield
    finally:
        for block, forward in kept.items():
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward


@torch.no_grad()
def find_chains(
    model: nn.Module, layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], run: Run
) -> tuple[list[Chain], str]:
    """Find the chains whose blocks make the passes over the model cheapest.

    A list of modules is a chain if every module runs once, what each returns (or the first entry of it) is the very
    tensor that the next one is first given, everything else that the blocks are given and return can be kept and does
    not depend on the first block, and the model without its blocks, given the last one's hidden state, hands the same
    inputs to all layers outside. Of nested lists those are taken whose blocks save most.

    Args:
        model: Run in evaluation mode; unchanged on return.
        layers: Layers that are to be fitted, by name.
        groups: Their names, those that share an input together.
        run: Runs the model on one batch.

    Returns:
        The chains in the order in which they run, none of them inside another, and if there are none, why.
    """
    reason = "no list of its modules runs as a chain"
    with evaluating(model), without_cache(model):
        found = _following(model, run)
        gains = {chain: gain for chain in found if (gain := _saved(chain, layers, groups)) > 0}
        while gains:
            chosen = _cheapest(gains)
            refused = {chain: why for chain in chosen if (why := _refusal(model, chain, layers, run)) is not None}
            if not refused:
                return [chain for chain in found if chain in chosen], ""
            for chain, why in refused.items():
                reason = f"the blocks of {chain.name!r} {why}"
                del gains[chain]
        return [], reason


def _cheapest(gains: Mapping[Chain, float]) -> set[Chain]:
    """Of chains inside each other, those that gain most together."""
    chosen: set[Chain] = set()
    for chain in sorted(gains, key=lambda chain: sum(len(list(b.modules())) for b in chain.blocks)):
        inside = {other for other in chosen if _overlap(chain, other)}
        if gains[chain] > sum(gains[other] for other in inside):
            chosen = {*(chosen - inside), chain}
    return chosen


def _following(model: nn.Module, run: Run) -> list[Chain]:
    """All lists whose members follow each other, in the order in which they run."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, LISTS) and len(module) > 1}
    members = list({id(m): m for module in lists.values() for m in module.children()}.values())
    before, calls, after = recorded(members, run)
    order = {key: place for place, key in enumerate(before)}
    chains = []
    for name, module in lists.items():
        blocks = {f"{name}.{key}".removeprefix("."): member for key, member in module.named_children()}
        if any(len(calls.get(id(block), ())) != 1 for block in blocks.values()) or len(blocks) < len(module):
            continue
        in_order = sorted(blocks, key=lambda at: order[id(blocks[at])])
        ids = [id(blocks[at]) for at in in_order]
        states = [after[key] for key in ids]
        tensors = all(isinstance(state, Tensor) and state.is_floating_point() for state in [before[ids[0]], *states])
        if tensors and all(before[late] is after[early] for early, late in pairwise(ids)):
            chains.append(Chain(model, name, tuple(in_order)))
    return sorted(chains, key=lambda chain: order[id(chain.blocks[0])])


def _saved(chain: Chain, layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> float:
    """Weight entries multiplied less, in all passes that look at the inputs of a group, than by passes of the model.

    A chain is begun by one more pass over the model.
    """
    sizes = {name: float(weight_matrix(layer).numel()) for name, layer in layers.items()}
    total, owner = sum(sizes.values()), {name: chain.owner(layer) for name, layer in layers.items()}
    saved = -total
    for block in {number for number in owner.values() if number is not None}:
        inside = sum(size for name, size in sizes.items() if owner[name] == block)
        saved += (total - inside) * sum(owner[group[0]] == block for group in groups)
    return saved


def _overlap(chain: Chain, other: Chain) -> bool:
    held = {id(module) for block in chain.blocks for module in block.modules()}
    return any(id(module) in held for block in other.blocks for module in block.modules())


def _refusal(model: nn.Module, chain: Chain, layers: Mapping[str, nn.Module], run: Run) -> str | None:
    """Why the blocks cannot be run one by one, as the end of a sentence; ``None`` if they can."""
    blocks = chain.blocks
    _, calls, after = recorded(blocks, run)
    _, nudged, _ = recorded(blocks, run, nudge=True)
    kept = [calls[id(block)][0] for block in blocks]
    for call, changed in zip(kept, (nudged[id(block)][0] for block in blocks), strict=True):
        foreign = unkeepable(call.beside())
        if foreign is not None:
            return f"are given or return a {foreign}, which may change from call to call"
        if not same(call.beside(), changed.beside()):
            return "hand on more than one hidden state"
    outside = {name: layer for name, layer in layers.items() if chain.owner(layer) is None}
    straight = layer_inputs(model, outside, run)
    with bypassed(chain, kept, after[id(blocks[-1])]):
        around = layer_inputs(model, outside, run)
    return None if same(straight, around) else "are looked at by later layers one by one"
