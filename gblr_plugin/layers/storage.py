"""Change the shape of a parameter without changing its identity, so that optimizers still hold it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["keep_components", "replace_storage"]


@torch.no_grad()
def replace_storage(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other contents of another shape, keeping its identity, also while an old graph is alive."""
    parameter.grad = None
    parameter.set_(value)  # type: ignore[call-overload]  # `.data =` would leave the old shape in the graph's metadata


def keep_components(parameter: nn.Parameter, dim: int, keep: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Keep the entries ``keep`` along ``dim`` of a parameter, its gradient and its state in the optimizers."""
    before, grad = parameter.shape, parameter.grad
    replace_storage(parameter, parameter.detach().index_select(dim, keep))
    if grad is not None:
        parameter.grad = grad.index_select(dim, keep)
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == len(before) and value.shape[dim] == before[dim]:
                state[key] = value.index_select(dim, keep)
