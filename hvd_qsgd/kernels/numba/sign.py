"""Sign on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.sign`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels, mode_number
from hvd_qsgd.codecs.qsgd import NORM_LANES
from hvd_qsgd.codecs.sign import Sign
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.reduce import all_finite, folded


@jit
def mean_magnitude(values):  # type: ignore[no-untyped-def]
    sums = np.zeros(NORM_LANES, np.float64)
    whole = len(values) // NORM_LANES * NORM_LANES
    for start in range(0, whole, NORM_LANES):
        for lane in range(NORM_LANES):
            sums[lane] += abs(np.float64(values[start + lane]))
    for lane in range(len(values) - whole):
        sums[lane] += abs(np.float64(values[whole + lane]))
    mean = np.float32(folded(sums) / len(values))
    return mean if mean < np.inf else np.float32(np.nan)


@jit
def encode(x, bucket_size, scales, packed):  # type: ignore[no-untyped-def]
    for bucket in range(len(scales)):
        scales[bucket] = mean_magnitude(x[bucket * bucket_size : (bucket + 1) * bucket_size])
    for byte in range(len(packed)):
        part = x[8 * byte : 8 * byte + 8]
        bits = np.uint8(0)
        for slot in range(len(part)):
            bits |= np.uint8(np.uint8(part[slot] < 0) << np.uint8(slot))
        packed[byte] = bits


@jit
def decode(scales, packed, bucket_size, out, mode):  # type: ignore[no-untyped-def]
    for bucket in range(len(scales)):
        scale = scales[bucket]
        for i in range(bucket * bucket_size, min((bucket + 1) * bucket_size, len(out))):
            value = -scale if (packed[i >> 3] >> (i & 7)) & 1 else scale
            if mode == 0:
                out[i] = value
            elif mode == 1:
                out[i] += value
            else:
                out[i] -= value


@dataclass(frozen=True)
class SignKernels(Kernels):
    """Numba implementation of a Sign codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Sign

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        size = self.codec.payload_size(x.size)
        self.codec.check_room(out, size)
        scales = np.empty(self.codec.buckets(x.size), np.float32)
        encode(x, self.codec.bucket_size, scales, out[4 * len(scales) : size])
        out[: 4 * len(scales)] = scales.view(np.uint8)
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.codec.check_payload(payload, out.size)
        number, at = mode_number(mode), 4 * self.codec.buckets(out.size)
        scales = np.frombuffer(payload[:at].tobytes(), np.float32)
        decode(scales, payload[at:], self.codec.bucket_size, out, number)

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
