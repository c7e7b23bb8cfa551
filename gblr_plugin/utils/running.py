"""Run a model on an example, in evaluation mode, with so many threads; afterwards all is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "run_example", "torch_threads"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each module in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_example(model: nn.Module, example_input: Any) -> Any:
    """What a model gives in evaluation mode.

    Args:
        model: In any mode.
        example_input: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
    """
    with evaluating(model):
        if isinstance(example_input, Mapping):
            return model(**example_input)
        return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch with so many threads; ``None`` leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
