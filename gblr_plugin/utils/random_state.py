"""Random numbers for a pass over a model, after which the caller's go on as if none had been drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["accelerators_of", "keep_random_state"]


def accelerators_of(model: nn.Module) -> set[torch.device]:
    """Devices of a model's parameters and buffers that draw from generators of their own."""
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}


@contextmanager
def keep_random_state(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """Restore the global generators of the CPU and of some accelerators at the end; no others are touched.

    ``torch.manual_seed`` would seed every device of the machine, also those that nothing restores.

    Args:
        devices: Accelerators, see :func:`accelerators_of`.
        seed: Of all these generators in the meantime; ``None``: they go on from where they are.
    """
    places = sorted(devices, key=str)
    with ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted({place.type for place in places}):
            own = [place.index for place in places if place.type == kind]
            kept.enter_context(torch.random.fork_rng(own, device_type=kind))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for place in places:
                with torch.accelerator.device_index(place.index):
                    torch.get_device_module(place).manual_seed(seed)
        yield
