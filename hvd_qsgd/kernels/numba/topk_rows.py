"""RowTopK on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_rows`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.codecs.topk_rows import INFINITY_BITS, RowTopK
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.reduce import all_finite
from hvd_qsgd.kernels.numba.topk import pack_bits_at


@jit
def encode_row(patterns, x, count, values, packed, at, width):  # type: ignore[no-untyped-def]
    """Append the ``count`` largest of a row, its values and, from bit ``at``, its positions."""
    length = len(patterns)
    # Magnitude above, position from the end below: a larger key is a larger or an earlier value.
    keys = np.empty(length, np.int64)
    largest = np.int64(0)
    for i in range(length):
        magnitude = np.int64(patterns[i] & np.int32(0x7FFFFFFF))
        largest = max(largest, magnitude)
        keys[i] = (magnitude << 16) | (length - 1 - i)
    lowest = np.partition(keys, length - count)[length - count]
    kept = 0
    for i in range(length):
        if keys[i] >= lowest:
            values[kept] = x[i] if largest < INFINITY_BITS else np.float32(np.nan)
            pack_bits_at(packed, at, np.int64(i), width)
            at += width
            kept += 1


@jit
def encode(x, row, full_count, tail_count, values, packed, width):  # type: ignore[no-untyped-def]
    packed[:] = 0
    patterns = x.view(np.int32)
    done = 0
    for start in range(0, len(x), row):
        stop = min(start + row, len(x))
        count = full_count if stop - start == row else tail_count
        encode_row(patterns[start:stop], x[start:stop], count, values[done : done + count], packed, done * width, width)
        done += count


@dataclass(frozen=True)
class RowTopKKernels(Kernels):
    """Numba implementation of a RowTopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: RowTopK

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size = codec.payload_size(x.size)
        codec.check_room(out, size)
        values = np.empty(codec.count(x.size), np.float32)
        counts = codec.kept(codec.row), codec.kept(x.size % codec.row)
        encode(x, codec.row, *counts, values, out[values.nbytes : size], codec.width)
        out[: values.nbytes] = values.view(np.uint8)
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.codec.decode_into(payload, out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        return self.codec.prepare_decode(payload, length)

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
