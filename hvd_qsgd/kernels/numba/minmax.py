"""MinMax on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.minmax`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels, mode_number
from hvd_qsgd.codecs.minmax import LIMITS_BYTES, MinMax, limits
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.qsgd import pack_bucket, unpack_bucket
from hvd_qsgd.kernels.numba.reduce import all_finite


@jit
def round_levels(x, low, factor, codes):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        # Truncation is rounding down here: nothing is negative.
        codes[i] = np.uint8(np.int32((np.float64(x[i]) - low) * factor + 0.5))


@jit
def look_up(codes, table, out, mode):  # type: ignore[no-untyped-def]
    if mode == 0:
        for i in range(len(codes)):
            out[i] = table[codes[i]]
    elif mode == 1:
        for i in range(len(codes)):
            out[i] += table[codes[i]]
    else:
        for i in range(len(codes)):
            out[i] -= table[codes[i]]


@dataclass(frozen=True)
class MinMaxKernels(Kernels):
    """Numba implementation of a MinMax codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: MinMax

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size = codec.payload_size(x.size)
        # Compiled code writes without looking.
        codec.check_room(out, size)
        low, high = limits(x)
        out[:LIMITS_BYTES] = np.array([low, high], "<f4").view(np.uint8)
        codes = np.zeros(x.size, np.uint8)
        if low < high:
            round_levels(x, np.float64(low), codec.levels_per_unit(low, high), codes)
        pack_bucket(codes, x.size, codec.bits, out[LIMITS_BYTES:size])
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        codec = self.codec
        codec.check_payload(payload, out.size)
        codes = np.empty(out.size, np.uint8)
        unpack_bucket(payload[LIMITS_BYTES:], out.size, codec.bits, codes)
        look_up(codes, codec.table(payload[:LIMITS_BYTES]), out, mode_number(mode))

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
