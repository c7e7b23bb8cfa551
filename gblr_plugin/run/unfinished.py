"""Keeps a run's trained networks on disk until the run is complete, so that after a kill none is trained again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..serialization import load_into, save
from ..utils.files import write_text

__all__ = ["Unfinished"]


class Unfinished:
    """Trained networks with their figures, by seed and name.

    Args:
        folder: Made when something is kept.
        task: What the run is, as JSON values. What another run has left is removed.
    """

    def __init__(self, folder: Path, task: Any) -> None:
        self._folder = folder
        self._task = json.loads(json.dumps(task))
        if folder.exists() and self._read("task") != self._task:
            shutil.rmtree(folder)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def keep(self, name: str, network: nn.Module, figures: Any) -> None:
        """Keep a network that has been trained; its figures, JSON values, are written last.

        Raises:
            OSError: If the folder cannot be written to.
        """
        write_text(self._folder / "task.json", json.dumps(self._task))
        save(network, self._folder / f"{name}.safetensors")
        write_text(self._folder / f"{name}.json", json.dumps(figures))

    def find(self, name: str, make: Callable[[], nn.Module]) -> tuple[nn.Module, Any] | None:
        """The network and figures kept under a name, or ``None``; ``make`` gives the dense network."""
        figures = self._read(name)
        return None if figures is None else (load_into(self._folder / f"{name}.safetensors", make), figures)

    def remove(self) -> None:
        """The run is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)
