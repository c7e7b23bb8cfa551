"""Inputs of the right shapes for a model of transformers, to count it or to export it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.validation import check_count
from .inputs import default_length, kind_of

__all__ = ["example_inputs"]

_SIDE = 224  # pixels, where the config of a model of images names none


def example_inputs(model: nn.Module, batch: int = 1, length: int | None = None) -> dict[str, Tensor]:
    """A batch of random tokens without padding, or of random images, by the names of the model's arguments.

    Args:
        model: Of transformers, also on the meta device.
        batch: Texts or images.
        length: Tokens of a text; ``None``: what ``gblr compress`` reads.

    Raises:
        ConfigError: If the model reads anything else, or a number is out of range.
    """
    kind, config = kind_of(model), getattr(model, "config", None)
    check_count("--batch", batch)
    weight = next(model.parameters())
    device = weight.device
    if kind == "images":
        size: Any = getattr(config, "image_size", None) or _SIDE
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = int(getattr(config, "num_channels", 3))
        return {"pixel_values": torch.rand(batch, channels, height, width, device=device, dtype=weight.dtype)}
    tokens = default_length(kind, getattr(config, "max_position_embeddings", None), length)
    ids = torch.randint(int(getattr(config, "vocab_size", 2)), (batch, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
