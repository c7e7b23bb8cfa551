"""Machine code kept on disk across processes: compiling the kernels takes eight seconds, loading them less than one.

numba's cache cannot find a function again that another function has made. It also notices edits only of the file that
holds a function, not of the files whose tiles the function uses. Here the names of the cached files carry a digest of
all sources, so that code of different sources is never mixed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

__all__ = ["compiled", "identity", "worker"]

_SOURCES = (
    "compile_cache.py",
    "simd.py",
    "simd_bfloat16.py",
    "numba_float32.py",
    "numba_bfloat16.py",
    "numba_masks.py",
    "numba_solve.py",
    "numba_spans.py",
    "numba_stages.py",
    "numba_team.py",
    "processor.py",
)
_REORDER = {"reassoc", "contract", "nsz"}  # sums may be reordered, which vector lanes need
_logger = logging.getLogger(__name__)


def _digest() -> str:
    """Digest of the sources of compiled functions and of the versions of the compiler; "" without sources."""
    found = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    try:
        for name in _SOURCES:
            found.update(name.encode() + b"\0" + (Path(__file__).parent / name).read_bytes())
    except OSError:
        return ""
    return found.hexdigest()[:16]


_DIGEST = _digest()  # at import, while the sources are those that are being imported


def identity() -> str:
    """What compiled kernels depend on: their sources, the compiler, the processor that it compiles for."""
    target = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode()).hexdigest()[:16]
    return f"{_DIGEST} {target}"


class _Cache(FunctionCache):
    """numba's files, keyed by processor and digest; where anything is wrong with them, the kernel is compiled again."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        name = f"{self._impl.filename_base}-{_DIGEST}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, _DIGEST)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # numba adds a hash of the closure, but intrinsics in it have a random name in every process.
        return sig, codegen.magic_tuple()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file can raise anything
            _logger.debug("compiled kernel in %s not used: %r", self._cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # a full or read-only disk, or a damaged index
            _logger.debug("compiled kernel not kept in %s: %r", self._cache_path, error)


def compiled(variant: str, keep: bool = False, fast: bool = False) -> Callable[[Any], Any]:
    """Decorator: ``numba.njit(nogil=True)`` for functions made several times by one piece of code.

    Machine code goes where numba puts it: ``NUMBA_CACHE_DIR``, else ``__pycache__`` next to the source, else the user's
    cache; numba tells processors apart. Without a writable place it is compiled in every process.

    Args:
        variant: Tells functions of one name apart, in symbols and in the names of files.
        keep: Keep the machine code of this function and of all that it calls; for functions that Python calls.
        fast: Let the order of floating-point sums change. NaN and infinity are kept.
    """

    def decorate(function: Any) -> Any:
        function.__qualname__ = f"{function.__name__}_{variant}"
        dispatcher = numba.njit(nogil=True, fastmath=_REORDER if fast else False)(function)
        if keep:
            _keep(dispatcher, function)
        return dispatcher

    return decorate


def _keep(made: Any, function: Any) -> None:
    if not _DIGEST:
        return
    try:
        made._cache = _Cache(function)
    except (RuntimeError, OSError, AttributeError, ImportError) as error:  # no place, or another numba
        _logger.debug("compiled kernels are not kept: %r", error)


def worker(variant: str) -> Callable[[Any], CFunc]:
    """Decorator: a C function of one address (int64), kept like those of :func:`compiled`; compiled at once."""

    def decorate(function: Any) -> CFunc:
        function.__qualname__ = f"{function.__name__}_{variant}"
        made = CFunc(function, ((types.int64,), types.void), {}, {"error_model": "numpy"})
        _keep(made, function)
        made.compile()
        return made

    return decorate
