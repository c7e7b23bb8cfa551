"""Import a host without its noise, and with one clear line where it is missing or of another version."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import metadata

__all__ = ["check_version", "quiet_import"]


def check_version(who: str, tested: str) -> None:
    """Refuse a host older than what was tested, and warn of a newer one; a host that is not installed is passed over.

    Args:
        who: The part of this package that needs it.
        tested: Name, first version, and first version that was not tested: ``"nni>=3.0,<4"``.

    Raises:
        ImportError: In one line, for an older version.
    """
    match = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", tested)
    if match is None:
        raise ValueError(f"{tested!r} is no range of versions")
    name, first, end = match.groups()
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return
    number = _numbers(found)
    if number < _numbers(first):
        raise ImportError(f"{who} needs {tested}, and {name} {found} is installed: pip install '{tested}'", name=name)
    if number >= _numbers(end):
        warnings.warn(f"{who} was tested with {tested}, and {name} {found} is installed", UserWarning, stacklevel=3)


def _numbers(version: str) -> tuple[int, ...]:
    """Of the release: 2.13.0+cpu is (2, 13, 0), 4 is (4, 0, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in release[0].split(".")] if release else []
    return tuple((*numbers, 0, 0, 0)[:3])


@contextlib.contextmanager
def quiet_import(who: str, needs: str, tested: str | None = None) -> Iterator[None]:
    """Hold back log lines and warnings of the modules imported inside; logging is as before afterwards.

    Args:
        who: The package that is being imported.
        needs: What to install where an import fails.
        tested: Range of versions, as :func:`check_version` takes it.

    Raises:
        ImportError: In one line, naming ``who`` and ``needs``, where a module outside this project is missing or older
            than what was tested.
    """
    if tested is not None:
        check_version(who, tested)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        if (error.name or "").startswith("gblr_plugin"):
            raise
        raise ImportError(f"{who} needs {needs}: {error}", name=error.name) from None
    finally:
        logging.disable(before)
