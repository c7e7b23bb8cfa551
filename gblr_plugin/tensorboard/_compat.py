"""The one private name of torch's ``SummaryWriter`` that this bridge needs: the writer of its event file.

``SummaryWriter`` has public methods for every kind of summary of TensorBoard's own plugins and none for those of
others; its ``FileWriter`` has ``add_summary``, which takes any.
"""

from __future__ import annotations

from typing import Any

__all__ = ["file_writer", "summary_writer"]

_FILE_WRITER = "_get_file_writer"


def summary_writer(logger: Any) -> Any | None:
    """The ``SummaryWriter`` that a logger is, or holds as ``experiment`` as Lightning's do; ``None`` if it has none."""
    for candidate in (logger, getattr(logger, "experiment", None)):
        if callable(getattr(candidate, _FILE_WRITER, None)):
            return candidate
    return None


def file_writer(writer: Any) -> Any | None:
    """The writer of a ``SummaryWriter``'s event file, opened again where it was closed.

    ``None`` for the object that stands in for a ``SummaryWriter`` in Lightning's processes but the first.
    """
    return getattr(writer, _FILE_WRITER)()
