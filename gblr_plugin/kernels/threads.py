"""A small pool of threads for kernels that release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["run_parts"]

_pools: dict[int, ThreadPoolExecutor] = {}
# Threads do not survive a fork; a child makes its own.
os.register_at_fork(after_in_child=_pools.clear)


def run_parts(work: Callable[[int], None], parts: Sequence[int]) -> None:
    """Run ``work(part)`` for every part and wait; the calling thread takes the first part itself.

    Args:
        work: Releases the interpreter lock while it computes.
        parts: Its arguments; one alone runs without the pool.
    """
    first, *others = parts
    if not others:
        work(first)
        return
    pool = _pools.get(len(others))
    if pool is None:
        pool = _pools.setdefault(len(others), ThreadPoolExecutor(len(others), thread_name_prefix="gblr"))
    futures = [pool.submit(work, part) for part in others]
    work(first)
    for future in futures:
        future.result()
