"""``gblr_plugin.load``: a file or a folder, into the network that is given or the one that the folder names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from . import serialization
from .errors import ConfigError

__all__ = ["load"]


def load(
    path: str | os.PathLike[str], network: nn.Module | Callable[[], nn.Module] | None = None, **options: Any
) -> nn.Module:
    """Load a saved model.

    A plan that was measured on another processor, or with another number of threads, is measured anew; one that was not
    measured, or is :meth:`~gblr_plugin.kernels.plan.Plan.unmeasured`, is kept, unless its compiled kernel is missing.

    Args:
        path: File written by :func:`gblr_plugin.save`, or a folder in the Hugging Face layout with a file or shards of
            that kind (:func:`gblr_plugin.huggingface.folders.save_pretrained`, ``gblr compress``).
        network: The dense network (any weights, also on the meta device), or a function that makes it. Changed in
            place; tensors are taken from the file, on the CPU. ``None`` for a folder whose ``config.json`` names a
            class of `transformers`: files hold weights, never code, so that any other network must be given.
        options: Of ``from_pretrained``, where transformers makes the network.

    Returns:
        The model with frozen structured weights, in evaluation mode.

    Raises:
        ConfigError: If the file is missing, damaged or not of this format, or does not fit the network.
    """
    if network is not None:
        if options:
            raise ConfigError(f"load: option {next(iter(options))!r} is for folders that transformers loads")
        return serialization.load_into(path, network)
    place = os.fspath(path)
    if not os.path.exists(os.path.join(place, "config.json")):
        missing = f"no file at {place!r}" if not os.path.exists(place) else f"{place!r} holds weights, not a network"
        raise ConfigError(f"load: {missing}; give the dense network, load({place!r}, network)")
    from .huggingface.folders import from_pretrained  # needs transformers

    return from_pretrained(place, **options)
