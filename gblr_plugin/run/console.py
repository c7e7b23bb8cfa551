"""The terminal of ``gblr run``: our lines alone; everything that the hosts print goes to the log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["Console", "captured_output"]


class Console:
    """Writes lines, and one progress line that is rewritten in place on a terminal and silent elsewhere.

    Args:
        stream: Where to write; default standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = 0
        self._last = 0.0

    def line(self, text: str = "") -> None:
        """Write whole lines."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def progress(self, text: str) -> None:
        """Show transient text, at most ten times a second; only on a terminal."""
        now = time.monotonic()
        if not self._live or now - self._last < 0.1:
            return
        self._last = now
        text = text[:79]
        self._stream.write("\r" + text.ljust(self._shown))
        self._stream.flush()
        self._shown = len(text)

    def _clear(self) -> None:
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0


@contextlib.contextmanager
def captured_output(log: Path | None) -> Iterator[TextIO]:
    """Send everything written to standard output and error, by Python or C, to a log file.

    Args:
        log: File to append to; ``None`` discards.

    Yields:
        A stream that still reaches the real standard output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        saved = [os.dup(1), os.dup(2)]
    except OSError:  # no real file descriptors (embedded interpreters): leave everything where it is
        yield sys.stdout
        return
    target = os.open(log if log is not None else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    terminal = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8", errors="replace")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(os.fdopen(os.dup(target), "a", encoding="utf-8", errors="replace", buffering=1))
        # Python's own streams may have been replaced (pytest, notebooks): redirect both levels.
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        try:
            os.dup2(target, 1)
            os.dup2(target, 2)
            yield terminal
        finally:
            terminal.close()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in (*saved, target):
                os.close(descriptor)
