"""Reductions of a vector without temporary memory."""

from __future__ import annotations

import numpy as np

from hvd_qsgd.codecs.qsgd import INFINITY_BITS
from hvd_qsgd.kernels.numba.compiling import jit


@jit
def largest_magnitude(patterns):  # type: ignore[no-untyped-def]
    """Bit pattern of the largest magnitude among float32 bit patterns (int32).

    As an integer the maximum vectorizes without fastmath, and NaN or infinity wins it.
    """
    largest = np.int32(0)
    for i in range(len(patterns)):
        largest = max(largest, np.int32(patterns[i] & np.int32(0x7FFFFFFF)))
    return largest


@jit
def folded(sums):  # type: ignore[no-untyped-def]
    """The sum of a power of two of sums, which it overwrites, in the order of :func:`hvd_qsgd.codecs.qsgd.row_sums`."""
    half = len(sums) // 2
    while half:
        for lane in range(half):
            sums[lane] += sums[lane + half]
        half //= 2
    return sums[0]


def all_finite(x: np.ndarray) -> bool:
    """Whether a flat float32 vector holds neither NaN nor an infinity."""
    return bool(largest_magnitude(x.view(np.int32)) < INFINITY_BITS)
