"""How a block of a model is called: everything but the hidden state, kept so that the block can be run alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "first_tensor", "hidden_of", "same", "unkeepable"]

_HIDDEN = object()
"""Stands where the hidden state was."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, which of a block is the hidden state; ``None`` without arguments."""
    return args[0] if args else next(iter(kwargs.values()), None)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a block without the hidden states that went in and came out.

    Args:
        args: Positional arguments.
        kwargs: Named arguments.
        output: What came back: the hidden state, or a tuple that begins with it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call:
        """Take the hidden states out of a call."""
        hidden = first_tensor(args, kwargs)
        args = tuple(_HIDDEN if value is hidden else value for value in args)
        named = {name: _HIDDEN if value is hidden else value for name, value in kwargs.items()}
        rest = tuple(output[1:]) if isinstance(output, tuple) else None
        return cls(args, named, rest if rest is None else (_HIDDEN, *rest))

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden state after the block. The block gets a copy of ``hidden``, which it may change in place."""
        given = hidden.clone()
        args = tuple(given if value is _HIDDEN else value for value in self.args)
        kwargs = {name: given if value is _HIDDEN else value for name, value in self.kwargs.items()}
        after: Tensor = hidden_of(block(*args, **kwargs))
        return after

    def returning(self, hidden: Tensor) -> Any:
        """What the block returned, with another hidden state."""
        return hidden if self.output is None else (hidden, *self.output[1:])

    def beside(self) -> tuple[Any, ...]:
        """All values of the call that are not the hidden state."""
        return self.args, self.kwargs, self.output


def hidden_of(output: Any) -> Any:
    """The hidden state in what a block returned."""
    return output[0] if isinstance(output, tuple) and output else output


def unkeepable(value: Any) -> str | None:
    """The type of the first value that may change from call to call, such as a cache; ``None`` if there is none."""
    if value is _HIDDEN or isinstance(value, (*_PLAIN, Tensor)):
        return None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for found in map(unkeepable, value) if found is not None), None)
    return type(value).__name__


def same(first: Any, second: Any) -> bool:
    """Whether two values that can be kept are equal, tensors entry by entry."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or (first.shape == second.shape and torch.equal(first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return first is second or bool(first == second)
