"""Half precision on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.cast`.

NumPy takes many times as long for values that are subnormal as float16, as small gradients are. Here every value takes
the same few instructions, several values at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels, mode_number
from hvd_qsgd.codecs.cast import NAN_BITS, Cast
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.intrinsics import bits_of, float_of
from hvd_qsgd.kernels.numba.reduce import all_finite

MAGNITUDE, INFINITY = (np.uint32(bits) for bits in (0x7FFFFFFF, 0x7F800000))
#: The exponents of float32 are biased by so much more than those of float16.
REBIAS = np.uint32((127 - 15) << 23)
#: The smallest float16 that is not subnormal, and what is too large for any.
SMALLEST_NORMAL, TOO_LARGE = np.uint32((127 - 14) << 23), np.uint32((127 + 16) << 23)
#: Subnormal float16 are multiples of this.
UNIT = np.float32(2.0**-24)
HALF_NAN, HALF_INFINITY, HALF_SIGN = np.uint32(NAN_BITS["float16"]), np.uint32(0x7C00), np.uint32(0x8000)
BRAIN_NAN = np.uint32(NAN_BITS["bfloat16"])


@jit
def to_half(bits, out):  # type: ignore[no-untyped-def]
    """float32 to float16 bit patterns, ties to even."""
    for i in range(len(bits)):
        u = bits[i] & MAGNITUDE
        half = np.uint32(u - REBIAS + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        # The product is exact. Larger values take no part.
        small = float_of(np.uint32(min(u, SMALLEST_NORMAL))) * np.float32(2.0**24)
        half = np.uint32(np.int32(np.rint(small))) if u < SMALLEST_NORMAL else half
        half = HALF_INFINITY if u >= TOO_LARGE else half
        half |= (bits[i] >> np.uint32(16)) & HALF_SIGN
        out[i] = np.uint16(HALF_NAN if u > INFINITY else half)


@jit
def to_brain(bits, out):  # type: ignore[no-untyped-def]
    """float32 to bfloat16 bit patterns, ties to even."""
    for i in range(len(bits)):
        u = bits[i]
        rounded = np.uint32(u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(BRAIN_NAN if (u & MAGNITUDE) > INFINITY else rounded)


@jit
def from_half(half):  # type: ignore[no-untyped-def]
    h = np.uint32(half)
    m = h & np.uint32(0x7FFF)
    shifted = m << np.uint32(13)
    u = np.uint32(shifted + REBIAS) if m < HALF_INFINITY else np.uint32(shifted | INFINITY)
    u = bits_of(np.float32(np.int32(m)) * UNIT) if m < np.uint32(0x400) else u
    return float_of(np.uint32(u | ((h & HALF_SIGN) << np.uint32(16))))


@jit
def from_brain(half):  # type: ignore[no-untyped-def]
    return float_of(np.uint32(np.uint32(half) << np.uint32(16)))


@jit
def decode(halves, brain, out, mode):  # type: ignore[no-untyped-def]
    for i in range(len(halves)):
        value = from_brain(halves[i]) if brain else from_half(halves[i])
        out[i] = value if mode == 0 else out[i] + value if mode == 1 else out[i] - value


@dataclass(frozen=True)
class CastKernels(Kernels):
    """Numba implementation of a Cast codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Cast

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        self.codec.check_room(out, 2 * x.size)
        # Payloads may begin at any address.
        halves = np.empty(x.size, np.uint16)
        (to_half if self.codec.dtype == "float16" else to_brain)(x.view(np.uint32), halves)
        out[: 2 * x.size] = halves.view(np.uint8)
        return 2 * x.size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.codec.check_payload(payload, out.size)
        halves = np.frombuffer(payload.tobytes(), np.uint16)
        decode(halves, self.codec.dtype == "bfloat16", out, mode_number(mode))

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
