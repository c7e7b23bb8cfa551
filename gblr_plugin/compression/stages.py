"""Time and peak memory of the stages of a compression."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .report import Stage

__all__ = ["Stages"]


class Stages:
    """Adds up the time of named stages, and keeps the largest memory of each.

    Stages may lie inside each other; the time of the inner one does not count for the outer.

    Args:
        device: Where the model is; its memory is looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int | None] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The stage that runs within this context."""
        self._close()
        self._open.append(name)
        try:
            yield
        finally:
            self._close()
            self._open.pop()

    def _close(self) -> None:
        """Book what has passed since the last call on the stage that is running."""
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
            peak, before = _peak(self._device), self._peaks.get(name)
            self._peaks[name] = peak if before is None or peak is None else max(peak, before)
        _forget_peak(self._device)
        self._since = time.perf_counter()

    def rows(self) -> tuple[Stage, ...]:
        """The stages in the order in which they began."""
        return tuple(Stage(name, seconds, self._peaks[name]) for name, seconds in self._seconds.items())


def _peak(device: torch.device) -> int | None:
    """Largest memory in bytes since :func:`_forget_peak`: of the accelerator, or of this process on Linux."""
    if device.type not in ("cpu", "meta"):
        return int(torch.accelerator.max_memory_allocated(device))
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _forget_peak(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: begin the process's peak anew
