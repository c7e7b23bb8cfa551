"""Import a host without its noise, and with one clear line where it is missing."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet_import"]


@contextlib.contextmanager
def quiet_import(who: str, needs: str) -> Iterator[None]:
    """Hold back log lines and warnings of the modules imported inside; logging is as before afterwards.

    Args:
        who: The package that is being imported.
        needs: What to install where an import fails.

    Raises:
        ImportError: In one line, naming ``who`` and ``needs``, where a module outside this project is missing.
    """
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
