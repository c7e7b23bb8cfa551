"""Files of format version 1, which torch.save wrote until 0.1: read, never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.layout import unpack
from ..tensor import GBLRTensor
from .header import FORMAT, Header, sound_notes
from .weights import flatten_weight, plan_record, unflatten_weight

__all__ = ["read_torch", "read_version1", "repacked"]


def read_torch(path: str, who: str) -> Any:
    """What ``torch.save`` wrote, on the CPU, without running code of the file.

    Args:
        path: The file.
        who: First word of error messages.

    Raises:
        ConfigError: If the file is missing, unreadable or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{who}: no file at {path!r}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{who}: cannot read {path!r}: {error.strerror}") from error
    except Exception as error:  # torch raises half a dozen kinds over damaged and foreign files
        raise ConfigError(f"{who}: {path!r} is damaged, or not a file of weights") from error


def read_version1(path: str) -> tuple[dict[str, Tensor], Header]:
    """The state of a version 1 file, its structured weights as they are there: :func:`repacked` makes them usable.

    Raises:
        ConfigError: If it is damaged or not such a file.
    """
    content = read_torch(path, "load")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"load: {path!r} is not a gblr_plugin model file")
    if content.get("version") != 1:
        raise ConfigError(f"load: {path!r} has format version {content.get('version')}, allowed are 1 and 2")
    state, linear, notes = (content.get(key) for key in ("state", "linear", "notes"))
    if (
        not (isinstance(state, dict) and isinstance(linear, list) and isinstance(notes, dict))
        or not all(isinstance(name, str) for name in (*state, *linear, *notes))
        or not sound_notes(notes)
    ):
        raise ConfigError(f"load: {path!r} is damaged, or not a gblr_plugin model file")
    return state, Header(linear=linear, notes=notes)


def repacked(state: dict[str, Tensor], skeleton: nn.Module, path: str) -> dict[str, Tensor]:
    """The state with its structured weights packed anew by the kernels of today.

    Raises:
        ConfigError: If one of them is damaged, or of another shape than the network's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    for name, value in state.items():
        if isinstance(value, GBLRTensor):
            if shapes.get(name) != tuple(value.outer_shape):
                raise ConfigError(
                    f"load: {path!r} does not fit the network: {name!r} has shape {tuple(value.outer_shape)}, "
                    f"the network's has {shapes.get(name)}"
                )
            try:
                state[name] = _repacked(name, value)
            except Exception as error:  # whatever comes of indices that do not fit
                raise ConfigError(f"load: {path!r} is damaged: the indices of {name!r} do not fit together") from error
    return state


def _repacked(name: str, weight: GBLRTensor) -> GBLRTensor:
    """The same weight, with indices made here: those of the file are only used to read its components."""
    layout = weight.packing
    tensors, record = flatten_weight(name, weight)
    again = unflatten_weight({**record, "plan": plan_record(weight.plan)}, tensors, name, tuple(weight.outer_shape))
    if not layout.dense and not layout.transposed:
        old, new = (unpack(w.packing, w.factors, w.lists) for w in (weight, again))
        # Entries outside the intervals, or components out of order, would be another matrix.
        if not (torch.equal(old.u, new.u) and torch.equal(old.v, new.v)):
            raise ValueError("entries outside their intervals")
    return again
