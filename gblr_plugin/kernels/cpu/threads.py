"""Threads for kernels that release the interpreter lock: torch's team of OpenMP threads, or else a small pool.

For some milliseconds after a product, torch's OpenMP threads wait for more work in a busy loop. Threads of another pool
would share the cores with these loops; torch's own threads begin at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["MOST_THREADS", "run_shares", "run_team"]

MOST_THREADS = 1024
"""More than processors have cores. Torch ends the process where the system has no more threads."""

_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def _after_fork() -> None:
    """Threads do not survive a fork: a child makes another pool, and avoids OpenMP, which would wait for them."""
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache
def _team() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library that torch uses, if it has that."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel: Any = library.GOMP_parallel  # also found in the libraries that it depends on
    except (OSError, AttributeError):
        return None
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return parallel  # type: ignore[no-any-return]  # a ctypes function


def run_team(worker: Any, data: int, threads: int) -> None:
    """Run a compiled worker on several threads at once, the calling one among them, and wait.

    Args:
        worker: A :class:`numba.core.ccallback.CFunc` of one address. It takes its work from tickets, since fewer
            threads may come than were asked for.
        data: The address that every thread gets.
        threads: Number of threads.
    """
    team = None if _forked else _team()
    if team is not None:
        team(worker.address, data, threads, 0)
        return
    run_shares(lambda _: worker.ctypes(data), range(threads))


def run_shares(work: Callable[[int], None], shares: Sequence[int]) -> None:
    """Run ``work(share)`` for every share and wait; the calling thread takes the first share itself.

    Args:
        work: Releases the interpreter lock while it computes.
        shares: Its arguments; a single one runs without the pool.
    """
    first, *others = shares
    if not others:
        work(first)
        return
    pool = _pools.get(len(others))
    if pool is None:
        pool = _pools.setdefault(len(others), ThreadPoolExecutor(len(others), thread_name_prefix="gblr"))
    futures = [pool.submit(work, share) for share in others]
    try:
        work(first)
    finally:
        wait(futures)  # a caller that is interrupted frees the memory that they write to
    for future in futures:
        future.result()
