"""Undocumented names of torch and torchao that ``gblr_plugin.tensor`` uses, each with the behaviour that it relies on.

``tests/tensor/test_compat.py`` checks that behaviour, so that a new version of a host that changes it is noticed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.decorators import skip
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, return_and_correct_aliasing

from ..utils.optional_imports import quiet_import

with quiet_import("gblr_plugin.GBLRTensor", "torchao 0.18", "torchao>=0.18,<0.19"):
    from torchao.quantization import Int8WeightOnlyConfig, PerRow
    from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER, register_quantize_module_handler
    from torchao.utils import TorchAOBaseTensor

__all__ = [
    "Int8WeightOnlyConfig",
    "PerRow",
    "TorchAOBaseTensor",
    "aten_functions",
    "int8_handler",
    "is_in_torch_dispatch_mode",  # a FLOP counter or another mode is at work
    "register_quantize_module_handler",
    "return_and_correct_aliasing",  # a result of detach() or t() is a view of its input for autograd
    "skip",  # torch.compile does not trace a function, and does not break the graph either
]

int8_handler: Any = _QUANTIZE_CONFIG_HANDLER[Int8WeightOnlyConfig]
"""What ``quantize_(model, Int8WeightOnlyConfig())`` does to a module. torchao knows one handler per config."""


def aten_functions(cls: type[torch.Tensor]) -> dict[Any, Any]:
    """The functions that a subclass of torchao's tensor has for torch's operators, such as ``clone`` and ``copy_``."""
    return cls._ATEN_OP_TABLE[cls]  # type: ignore[attr-defined,no-any-return]  # torchao makes it with the class
