"""The terminal of ``gblr run``: our lines alone; everything that the hosts print goes to the log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["CapturedOutput", "Console", "captured_output"]


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


class CapturedOutput:
    """Where captured output goes, and a way past it."""

    def __init__(self, terminal: TextIO, file: TextIO | None) -> None:
        self.terminal = terminal
        self._file = file

    def send_to(self, log: Path) -> None:
        """Append all further output to a log file, also that of streams which the hosts hold already."""
        if self._file is None:
            return
        self._file.flush()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in (1, 2, self._file.fileno()):
            os.dup2(target, descriptor)
        os.close(target)


@contextlib.contextmanager
def captured_output() -> Iterator[CapturedOutput]:
    """Keep everything written to standard output and error, by Python or C, off the terminal.

    Discarded until :meth:`CapturedOutput.send_to` names a log file.

    Yields:
        The capture; its ``terminal`` still reaches the real standard output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        saved = [os.dup(1), os.dup(2)]
    except OSError:  # no real file descriptors (embedded interpreters): leave everything where it is
        yield CapturedOutput(sys.stdout, None)
        return
    terminal = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8", errors="replace")
    target = os.open(os.devnull, os.O_WRONLY)
    # Kept open for good: loggers of the hosts hold on to it, and complain into the void rather than on the terminal.
    file = os.fdopen(target, "a", encoding="utf-8", errors="replace", buffering=1)
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            os.dup2(target, 1)
            os.dup2(target, 2)
            yield CapturedOutput(terminal, file)
        finally:
            terminal.close()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
