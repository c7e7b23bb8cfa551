"""Where snapshots go: a bridge to a host that shows structures registers a function here, and whoever trains calls it.

So a Lightning callback feeds the tab of TensorBoard without importing the bridge to TensorBoard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["register_sink", "send_snapshot"]


class Sink(Protocol):
    """Logs a snapshot through a logger; does nothing for a logger that is not of its host."""

    def __call__(self, logger: Any, layers: Mapping[str, Any], step: int, **about: Any) -> None:
        """Log the present structure of ``layers``; ``about`` as in :func:`~.snapshot.take_snapshot`."""


_sinks: dict[str, Sink] = {}


def register_sink(name: str, sink: Sink) -> None:
    """Send snapshots to a function too, once under each name."""
    _sinks[name] = sink


def send_snapshot(logger: Any, layers: Mapping[str, Any], step: int, **about: Any) -> None:
    """Give the present structure of layers to every sink.

    Args:
        logger: Of any kind; each sink takes what belongs to its host.
        layers: Layers by name.
        step: Step of the snapshot, at least 0.
        **about: ``budget``, ``sigma``, ``lambdas`` and ``loss`` as :func:`~.snapshot.take_snapshot` takes them.
    """
    for sink in _sinks.values():
        sink(logger, layers, step, **about)
