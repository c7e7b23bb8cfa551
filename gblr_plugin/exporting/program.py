"""``torch.export`` of converted models, into programs that run where this package is not installed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.utils import unwrap_tensor_subclass

from ..tensor.gblr_tensor import GBLRTensor

__all__ = ["export"]


class _Wrap(nn.Module):
    """Parametrization: the frozen weight made of its buffers, so that a program holds plain tensors."""

    def forward(self, *buffers: Tensor) -> Tensor:
        weight: Tensor = GBLRTensor.__tensor_unflatten__(
            dict(zip(self.names, buffers, strict=True)), self.facts, None, None
        )
        return weight

    def right_inverse(self, weight: GBLRTensor) -> list[Tensor]:
        names, self.facts = weight.__tensor_flatten__()
        self.names = [name for name in names if name != "matrix"]
        return [getattr(weight, name) for name in self.names]


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any
) -> torch.export.ExportedProgram:
    """Export a model with converted layers (linear and convolutions); the model itself stays as it is.

    The program holds factors and lists as plain tensors and multiplies by torch operations whatever the plan says:
    ``torch.export.save``, ``torch.export.load`` and AOTInductor
    (``torch._inductor.aoti_compile_and_package``) need nothing of this package to run it.

    Args:
        model: A model with converted layers; layers quantized by torchao and dense ones may be among them.
        args: Example inputs, as in ``torch.export.export``.
        kwargs: Example inputs by name.
        options: Other options of ``torch.export.export``, such as ``dynamic_shapes`` and ``strict``.

    Returns:
        The program; its state has the names of parametrizations (``fc.parametrizations.weight.original0``).
    """
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, GBLRTensor):
                parametrize.register_parametrization(module, name, _Wrap(), unsafe=True)
    return torch.export.export(unwrap_tensor_subclass(plain), args, kwargs, **options)
