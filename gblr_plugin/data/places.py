"""Where data is looked for, and the one line that is shown where it is missing."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

__all__ = ["existing_folder", "missing"]


def missing(what: str, looked_for: str, place: str | Path, how: str) -> ConfigError:
    """The error about a data set that is not there.

    Args:
        what: Name of the data set.
        looked_for: Files or folders that were looked for.
        place: Where.
        how: How to get it.
    """
    return ConfigError(f"data: no {what} in {str(place)!r}: looked for {looked_for}. To get it: {how}")


def existing_folder(folder: object, what: str, looked_for: str, how: str) -> Path:
    """The data set's folder as a path.

    Raises:
        ConfigError: If no folder is named, or there is none.
    """
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"model: folder must be the path of {what}, got {folder!r}. To get it: {how}")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise missing(what, looked_for, path, how)
    return path
