"""The state of random generators: kept, set again, and left alone by a pass over a model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["accelerators_of", "keep_random_state", "random_state", "set_random_state"]


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
            indices = [place.index for place in places if place.type == kind]
            kept.enter_context(torch.random.fork_rng(indices, device_type=kind))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for place in places:
                with torch.accelerator.device_index(place.index):
                    torch.get_device_module(place).manual_seed(seed)
        yield


def random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy and torch (all devices), as values that a checkpoint may hold."""
    kind, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Draw what was drawn after :func:`random_state`; devices that are not there are left out."""
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, key.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)
