"""Converted models on several processes: DistributedDataParallel, FSDP2, and tensor parallelism by components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor.parallel import ParallelStyle

from ..errors import ConfigError
from .gblr_tensor import GBLRTensor

__all__ = ["ComponentParallel", "component_part", "frozen_weights", "keep_frozen_local"]


def frozen_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The structured weights of a converted model, by name; a shared one under each of its names.

    Every process holds all of them: ``fully_shard(model, ignored_params=set(frozen_weights(model).values()))``.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if isinstance(parameter.data, GBLRTensor)}


def keep_frozen_local(model: nn.Module) -> nn.Module:
    """Tell DistributedDataParallel to leave the structured weights of a converted model alone.

    Every process loads them itself.

    Args:
        model: The module that will be given to DistributedDataParallel.

    Returns:
        The model itself.
    """
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = [*before, *frozen_weights(model)]  # type: ignore[assignment]  # as torch names it
    return model


@torch.no_grad()
def component_part(weight: GBLRTensor, rank: int, world_size: int) -> GBLRTensor:
    """Some of a weight's components; all parts have about equal costs and sum to the weight.

    Args:
        weight: A structured weight, floating-point or int8.
        rank: Number of the process whose components are returned, from 0.
        world_size: Number of processes, over which the components are spread.

    Raises:
        ConfigError: If the weight is kept as a dense matrix, which has no components.
    """
    if weight.packing.dense:
        raise ConfigError("component parallel: a weight that is stored dense has no components; leave it as it is")
    matrix = weight.to_structured()
    # Components are dealt out in order of falling cost: to the first process up to the last, then back again.
    order = matrix.component_multiply_adds.argsort(descending=True, stable=True)
    place = torch.arange(len(order), device=order.device) % (2 * world_size)
    mine = torch.zeros_like(order, dtype=torch.bool)
    mine[order[torch.minimum(place, 2 * world_size - 1 - place) == rank]] = True
    chosen = matrix.select(mine)
    result: GBLRTensor = GBLRTensor.from_structured(chosen, shape=weight.outer_shape, factor_dtype=weight.factor_dtype)
    return result


class _SumOverMesh(torch.autograd.Function):
    """Sum of the partial outputs, of which each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SameInput(torch.autograd.Function):
    """The input that every process has; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ComponentParallel(ParallelStyle):
    """Tensor parallelism of a converted layer: each process holds some of its components, and outputs are summed.

    A structured weight is a sum of rank-1 blocks, so that any structure can be divided by cost, also where intervals
    wrap around. Every process has the complete input, output and bias; the bias is added once. For
    ``torch.distributed.tensor.parallel.parallelize_module``.

    Example:
        >>> parallelize_module(model, mesh, {"blocks.*.fc1": ComponentParallel()})  # doctest: +SKIP

    Raises:
        ConfigError: When applied to a layer without a structured weight.
    """

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(weight.data, GBLRTensor):
            raise ConfigError(f"component parallel: a {type(module).__name__} without a structured weight")
        group, layer = device_mesh.get_group(), module
        share = component_part(weight.data, device_mesh.get_local_rank(), device_mesh.size())
        layer.weight = nn.Parameter(share, requires_grad=False)
        bias: Any = module.bias
        layer.register_parameter("bias", None)
        layer.register_parameter("full_bias", bias)

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return _SameInput.apply(arguments[0], group), *arguments[1:]

        def after(_: nn.Module, __: Any, partial: Tensor) -> Tensor:
            total: Tensor = _SumOverMesh.apply(partial, group)
            if bias is None:
                return total
            shape = (-1, *(1,) * (len(weight.shape) - 2))  # channels of a convolution come before its positions
            return total + layer.full_bias.view(shape)  # type: ignore[operator]  # the parameter above

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
        return layer
