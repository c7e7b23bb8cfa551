"""Finished blocks in a folder, so that an interrupted compression goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..layers.dense import weight_matrix
from ..serialization import save
from ..serialization.model import load_into
from ..utils.files import write_text

__all__ = ["KeptBlocks", "fingerprint"]

ABOUT = "compression.json"


def fingerprint(settings: Mapping[str, Any], layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> str:
    """A text that differs where settings, dense weights or calibration batches differ.

    Args:
        settings: Plain JSON values.
        layers: The dense layers by name.
        batches: Of the calibration.
    """
    known = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, layer in layers.items():
        weight = weight_matrix(layer).double()
        known.update(
            f"{name}{tuple(weight.shape)}{float(weight.sum()).hex()}{float(weight.square().sum()).hex()}".encode()
        )
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            known.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return known.hexdigest()


class KeptBlocks:
    """The blocks of one compression in a folder: a safetensors file each, and what is to be reported of it.

    Args:
        folder: Made if it is missing.
        mark: Of the compression, see :func:`fingerprint`.

    Raises:
        ConfigError: If the folder holds blocks of another compression.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        about = folder / ABOUT
        if about.exists():
            try:
                kept = json.loads(about.read_text(encoding="utf-8"))["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"compress: resume: {str(about)!r} is damaged; give an empty folder") from error
            if kept != mark:
                raise ConfigError(
                    f"compress: resume: {str(folder)!r} holds blocks of another model, other settings or other "
                    "calibration batches; give an empty folder"
                )
        else:
            write_text(about, json.dumps({"fingerprint": mark}))

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self._folder / f"{name}.safetensors", self._folder / f"{name}.json"

    def save(self, model: nn.Module, name: str, about: Mapping[str, Any]) -> None:
        """Keep a finished block of a model.

        Args:
            model: Holds the block, converted.
            name: Full name of the block.
            about: Plain values to get back with it.
        """
        tensors, record = self._paths(name)
        save(nn.ModuleDict({"block": model.get_submodule(name)}), tensors)
        write_text(record, json.dumps(about))

    def restore(self, model: nn.Module, name: str) -> dict[str, Any] | None:
        """Put a finished block in the place of the dense block of a model.

        Returns:
            What was kept with it; ``None`` if the block is not finished.
        """
        tensors, record = self._paths(name)
        if not record.exists():
            return None
        found = load_into(tensors, nn.ModuleDict({"block": model.get_submodule(name)}))
        model.set_submodule(name, found.get_submodule("block"))
        about: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return about
