"""What this bridge uses of torchao beyond its documented names; ``tests/torchao/test_compat.py`` checks each."""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.optional_imports import quiet_import

with quiet_import("gblr_plugin.GBLRConfig", "torchao 0.18"):
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import FqnToConfig, quantize_
    from torchao.quantization.quant_api import _is_linear as default_filter
    from torchao.quantization.transform_module import register_quantize_module_handler

__all__ = [
    "AOBaseConfig",
    "FqnToConfig",
    "default_filter",  # the filter that quantize_ uses where it is given none: linear layers
    "quantize_call",
    "register_quantize_module_handler",
]


def quantize_call() -> dict[str, Any]:
    """The arguments of the ``quantize_`` that is at work, empty where a handler was called without it.

    torchao shows a handler one layer at a time and has no hook that sees the model, without which a handler cannot tell
    that a weight is tied or that a layer is an output head. So the arguments are read from the frame of ``quantize_``.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not quantize_.__code__:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals
