"""The terminal of the commands: our lines alone; everything that the hosts print goes to a log file, or past it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["CapturedOutput", "Console", "captured_output"]

_OFTEN, _SELDOM = 0.1, 60.0  # seconds between two texts of progress, on a terminal and elsewhere


class Console:
    """Writes lines, and progress: one line that is rewritten in place on a terminal, a new line each minute elsewhere.

    Args:
        stream: Where to write; default standard output.
        quiet: Whether results alone are written.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._live = self._stream.isatty()
        self._shown = 0
        self._last = 0.0 if self._live else time.monotonic()

    def result(self, text: str) -> None:
        """Write what was asked for."""
        self.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def line(self, text: str = "") -> None:
        """Write a line about what was done, unless the console is quiet."""
        if not self._quiet:
            self.result(text)

    def progress(self, text: str) -> None:
        """Show what is being done, at most ten times a second on a terminal, and once a minute elsewhere."""
        now = time.monotonic()
        if self._quiet or now - self._last < (_OFTEN if self._live else _SELDOM):
            return
        self._last = now
        text = text[:79]
        if not self._live:
            return self.line(text)
        self._stream.write("\r" + text.ljust(self._shown))
        self._stream.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Take the line of progress off the terminal."""
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0


class CapturedOutput:
    """Where captured output goes, and two ways past it.

    Args:
        terminal: The real standard output.
        errors: The real standard error.
        file: Where captured output goes; ``None``: nothing is captured for a log.
    """

    def __init__(self, terminal: TextIO, errors: TextIO, file: TextIO | None) -> None:
        self.terminal, self.errors = terminal, errors
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
def captured_output(shown: bool = False) -> Iterator[CapturedOutput]:
    """Keep everything written to standard output and error, by Python or C, off the terminal.

    Discarded until :meth:`CapturedOutput.send_to` names a log file.

    Args:
        shown: Whether it goes to standard error instead, and to no log.

    Yields:
        The capture; its ``terminal`` and ``errors`` still reach the real streams.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        saved = [os.dup(1), os.dup(2)]
    except OSError:  # no real file descriptors (embedded interpreters): leave everything where it is
        yield CapturedOutput(sys.stdout, sys.stderr, None)
        return
    terminal, errors = (os.fdopen(os.dup(descriptor), "w", encoding="utf-8", errors="replace") for descriptor in saved)
    target = os.dup(saved[1]) if shown else os.open(os.devnull, os.O_WRONLY)
    # Kept open for good: loggers of the hosts hold on to it, and complain into the void rather than on the terminal.
    file = os.fdopen(target, "a", encoding="utf-8", errors="replace", buffering=1)
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            os.dup2(target, 1)
            os.dup2(target, 2)
            yield CapturedOutput(terminal, errors, None if shown else file)
        finally:
            terminal.close()
            errors.close()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
