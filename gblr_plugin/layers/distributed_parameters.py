"""Read, write and check parameters of which each process holds a part.

Under FSDP2 a parameter is a DTensor of which each process holds some rows. Widths are (2, K), so that a process may
hold only the row widths, or nothing. To count multiply-adds, a process must gather all widths: a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = ["all_finite", "full_tensor", "local_part", "replicated", "with_zero_gradients", "write_full_tensor"]


def _mesh_tensor(tensor: Tensor) -> Any:
    """The tensor as a DTensor, or ``None``."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a parameter from all processes, without gradient; every process of its mesh must call this."""
    shared = _mesh_tensor(tensor)
    full: Tensor = tensor.detach() if shared is None else shared.detach().full_tensor()
    return full


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds, to be changed in place under ``no_grad``."""
    shared = _mesh_tensor(tensor)
    local: Tensor = tensor if shared is None else shared.to_local()
    return local


@torch.no_grad()
def write_full_tensor(parameter: Tensor, value: Tensor) -> None:
    """Write a parameter from a value that every process has; each process writes the rows that it holds."""
    shared = _mesh_tensor(parameter)
    if shared is None:
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.dtype)
    cut = distribute_tensor(value, shared.device_mesh, shared.placements, src_data_rank=None)
    shared.to_local().copy_(cut.to_local())


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every entry on every process is finite; one answer for all."""
    values = [local_part(tensor) for tensor in tensors]
    values = [value.coalesce().values() if value.is_sparse else value for value in values]
    if not values:
        return True
    # A finite sum proves that all entries are finite, and is several times cheaper than a test of each entry. If the
    # sum is not finite, which may be an overflow, all entries are tested.
    answer = torch.isfinite(
        torch.stack([value.sum(dtype=torch.float32).to(values[0].device) for value in values])
    ).all()
    finite = bool(answer)
    if not finite:
        answer = torch.stack([torch.isfinite(value).all().to(values[0].device) for value in values]).all()
    shared = next((found for found in map(_mesh_tensor, tensors) if found is not None), None)
    if shared is not None:
        least = answer.to(torch.int32)
        for group in shared.device_mesh.get_all_groups():
            dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        return bool(least)
    return finite or bool(answer)


def replicated(tensors: Iterable[Tensor]) -> bool:
    """Whether several processes train, each with these whole parameters (DistributedDataParallel)."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return together and all(_mesh_tensor(tensor) is None for tensor in tensors)


class _WithZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)


def with_zero_gradients(tensor: nn.Parameter, others: Sequence[Tensor]) -> Tensor:
    """The same tensor, made to depend on ``others`` such that their gradients are zero.

    DistributedDataParallel waits for a gradient of every parameter that needed one when it was made.
    """
    result: Tensor = _WithZeroGradients.apply(tensor, *others)  # type: ignore[no-untyped-call]  # untyped in torch
    return result
