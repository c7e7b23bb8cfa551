"""Undocumented functions of torch that the kernels call; ``tests/kernels/test_compat.py`` checks each of them.

Kernels read raw memory, so they may run only where nothing but the result of a product is wanted: no gradients in
forward mode, no traces, no transforms. These functions tell whether any of these is at work.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["autocast_on", "dispatch_modes", "forward_gradients", "functorch_transform", "tracing"]

tracing = torch._C._is_tracing
"""Whether ``torch.jit.trace`` is at work."""

autocast_on = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device."""

dispatch_modes = torch._C._len_torch_dispatch_stack
"""Number of modes, such as FLOP counters and fake tensors, that see every operation."""

functorch_transform = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of ``torch.func``, such as vmap; ``None`` outside of them."""


def forward_gradients() -> bool:
    """Whether gradients are computed in forward mode."""
    return bool(forward_ad._current_level >= 0)
