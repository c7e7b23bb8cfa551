"""The hidden states of a chain of blocks at one border, in the dense network and in the one compressed so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..layers.dense import stored_weight
from .calls import Call
from .chains import Chain, bypassed, recorded

__all__ = ["StandIns", "Stream"]


class StandIns:
    """Dense weights that stand in for the layers fitted so far, without touching the model's parameters."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, Tensor, Tensor | None]] = []

    def add(self, module: nn.Module, estimate: Tensor, shift: Tensor | None) -> None:
        """Let this (m, n) approximation stand in for a layer, and add the (m,) shift to the layer's outputs."""
        weight: Any = module.weight
        shift = None if shift is None else shift.to(weight)
        if shift is not None and isinstance(module, nn.Conv1d | nn.Conv2d):
            shift = shift.reshape(-1, *[1] * len(module.kernel_size))
        self._done.append((module, stored_weight(module, estimate), shift))

    def __len__(self) -> int:
        return len(self._done)

    def keep_in(self, block: nn.Module) -> None:
        """Leave out layers that are not in a block any more; what replaced them has their hooks."""
        inside = {id(module) for module in block.modules()}
        self._done = [entry for entry in self._done if id(entry[0]) in inside]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the model runs with them."""
        kept, handles = [], []
        try:
            for module, stand_in, shift in self._done:
                weight: Any = module.weight
                kept.append((weight, weight.data))
                weight.data = stand_in
                if shift is not None:
                    handles.append(module.register_forward_hook(lambda _m, _x, y, by=shift: y + by))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight, data in kept:
                weight.data = data


class Stream:
    """The hidden states of one network at a border of a chain's blocks, one batch each, and how blocks are called.

    Args:
        chain: The blocks.
        states: (..., features) hidden states before the block that runs next, by batch.
        calls: The calls of all blocks, by batch.
    """

    def __init__(self, chain: Chain, states: Iterable[Tensor], calls: Sequence[Sequence[Call]]) -> None:
        self.chain, self.states, self.calls = chain, list(states), calls
        self.place = 0

    @classmethod
    def begin(cls, chain: Chain, runs: Iterable[Callable[[], object]]) -> Stream:
        """The stream before the first block; the model is run as far as the last one, once a batch."""
        blocks = chain.blocks
        states, calls = [], []
        for run in runs:
            before, found, _ = recorded(blocks, run, alone=True)
            states.append(before[id(blocks[0])])
            calls.append([found[id(block)][0] for block in blocks])
        return cls(chain, states, calls)

    def copy(self) -> Stream:
        """Another stream from the same states, which neither changes in place."""
        return Stream(self.chain, self.states, self.calls)

    @property
    def block(self) -> nn.Module:
        """The block that runs next."""
        return self.chain.blocks[self.place]

    def run(self, batch: int) -> Tensor:
        """The hidden state of a batch after the next block."""
        return self.calls[batch][self.place].run(self.block, self.states[batch])

    def advance(self) -> None:
        """Go on by one block."""
        for batch in range(len(self.states)):
            self.states[batch] = self.run(batch)
        self.place += 1

    def bypassed(self, batch: int) -> Any:
        """A context in which the model uses the last states of a stream at its end, instead of running the blocks."""
        return bypassed(self.chain, self.calls[batch], self.states[batch])
