"""Threads for CPU kernels: parts of one long vector, each computed by a thread of its own.

The kernels leave Python's lock while they compute. A part has the bytes that it has anyway, whatever the number of
threads, because random words are counted by element.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

#: Elements that are worth a thread: some 30 microseconds of encoding, about what it takes to hand them over.
LEAST_ELEMENTS = 1 << 17

_threads = 1
_pool: ThreadPoolExecutor | None = None


def use_threads(count: int) -> None:
    """Let kernels use up to ``count`` threads, the calling one among them."""
    global _threads, _pool
    if count != _threads:
        _threads, _pool = count, None


def owned_cores(processes: int) -> int:
    """Cores for each of so many processes that share those that this one may run on; at least 1."""
    return max(len(os.sched_getaffinity(0)) // processes, 1)


def in_parts(length: int, unit: int, call: Callable[[int, int], object]) -> None:
    """Call ``call(start, stop)`` for ranges of units that together are all units of a vector.

    Args:
        length: elements of the vector.
        unit: elements that must stay together; the last unit may be shorter.
    """
    global _pool
    units = -(-length // unit)
    # Read once: another thread may change them.
    threads, pool = _threads, _pool
    parts = min(threads, length // LEAST_ELEMENTS, units)
    if parts <= 1:
        call(0, units)
        return
    if pool is None:
        pool = _pool = ThreadPoolExecutor(threads - 1, "hvd_qsgd kernel")
    bounds = [units * part // parts for part in range(parts + 1)]
    others = [pool.submit(call, *bounds[part : part + 2]) for part in range(1, parts)]
    try:
        call(*bounds[:2])
    finally:
        # The arrays must not be touched any more once this has returned or raised.
        errors = [error for error in [other.exception() for other in others] if error is not None]
    if errors:
        raise errors[0]


def _forget_pool() -> None:
    global _pool
    _pool = None


# Threads do not survive a fork, as data loaders make them.
os.register_at_fork(after_in_child=_forget_pool)
