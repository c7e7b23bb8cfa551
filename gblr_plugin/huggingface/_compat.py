"""The names of transformers that are not documented and that this bridge needs, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

__all__ = ["decode", "mark_initialised", "quantized_by", "wrap_save_pretrained"]


def mark_initialised(tensor: Tensor) -> Tensor:
    """Let ``from_pretrained`` pass over a tensor where it initialises weights that no file holds."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # the mark of transformers
    return tensor


@contextmanager
def quantized_by(model: Any, quantizer: Any) -> Iterator[None]:
    """For a time, a model as one that ``from_pretrained`` loaded from a folder of a quantizer's method.

    ``save_pretrained`` asks the model's quantizer for the tensors to write, and writes the config of its method.
    """
    changed = ((vars(model), "hf_quantizer"), (vars(model.config), "quantization_config"))
    before = [values.get(name) for values, name in changed]
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    try:
        yield
    finally:
        for (values, name), value in zip(changed, before, strict=True):
            if value is None:
                del values[name]
            else:
                values[name] = value


def wrap_save_pretrained(wrap: Callable[[Any], Any]) -> None:
    """Put a function around the ``save_pretrained`` of all models; transformers has no hook for a model in memory."""
    PreTrainedModel.save_pretrained = wrap(PreTrainedModel.save_pretrained)


def decode(network: Any, ids: Tensor) -> None:
    """Run a causal language model over (1, tokens) ids, one token at a time, each with the cache of those before it."""
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"  # until 5.2x
    cache = None
    for place in range(ids.shape[1]):
        cache = getattr(network(input_ids=ids[:, place : place + 1], use_cache=True, **{name: cache}), name)
