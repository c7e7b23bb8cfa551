"""Call a function as soon as a host's module has been imported, without importing the host."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["after_import"]


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call a function once the module is imported: now if it is already, else right after its own code has run.

    Args:
        name: Full name of the module, which need not be installed.
        call: The function. What it raises is raised by the import.
    """
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and makes its loader call a function at the end."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification; ``None`` for every other module."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the others are asked, and this one is not needed again
        spec = find_spec(fullname)
        loader = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.call()

            loader.exec_module = run_and_call  # type: ignore[method-assign]  # of this module's loader alone
        return spec
