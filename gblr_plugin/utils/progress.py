"""Progress over many layers, shown on a terminal and nowhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["shown_by", "track"]

T = TypeVar("T")

_show: ContextVar[Callable[[str], None] | None] = ContextVar("gblr_progress", default=None)


@contextlib.contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Within this context, progress goes to ``show``, one transient text at a time, instead of to the terminal."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


def track(names: Sequence[T], what: str) -> Iterator[T]:
    """Go through names, showing how many are done and the time left; on a terminal only, unless :func:`shown_by`.

    Args:
        names: Shown one by one.
        what: What is being done, e.g. ``"decomposing"``.
    """
    show = _show.get()
    terminal = show is None and len(names) > 1 and sys.stderr.isatty()
    start, width = time.monotonic(), 0
    for done, name in enumerate(names):
        left = f", {(time.monotonic() - start) / done * (len(names) - done):.0f} s left" if done else ""
        text = f"{what} {done + 1}/{len(names)}: {name}{left}"[:79]
        if show is not None:
            show(text)
        elif terminal:
            print("\r" + text.ljust(width), end="", file=sys.stderr, flush=True)
            width = len(text)
        yield name
    if terminal:
        print("\r" + " " * width + "\r", end="", file=sys.stderr, flush=True)
