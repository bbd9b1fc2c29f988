"""MinMax: affine quantization of a whole tensor between its smallest and its largest value.

Source: Rudakov et al., Activations and Gradients Compression for Model-Parallel Training (arXiv
2401.07788), uniform quantization. It suits one-sided values, such as activations after a ReLU: a
symmetric scale would leave half of the codes unused. For gradients, use :class:`QSGD`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_integer, combine
from hvd_qsgd.codecs.bits import pack_planes, planes_size, unpack_planes
from hvd_qsgd.codecs.qsgd import NAN_BITS

#: The smallest and the largest value, float32, before the codes.
LIMITS_BYTES = 8


@dataclass(frozen=True)
class MinMax(Codec):
    """Quantize a tensor to ``2^bits`` equally spaced values from its minimum to its maximum.

    Args:
        bits: 2..8; the step between two values is ``(max - min) / (2^bits - 1)``.

    Rounding is to the nearest value, ties upwards, so the error is at most half a step. The
    minimum comes back exactly. A tensor that holds NaN or an infinity decodes to NaN as a whole.

    Raises:
        ConfigError: ``bits`` is out of range.

    Examples:
        >>> codec = MinMax(bits=2)
        >>> codec.decode(codec.encode(np.array([0.0, 1.2, 2.0, 3.0], np.float32)), (4,)).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    bits: int = 8

    name: ClassVar[str] = "minmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_integer("MinMax", "bits", self.bits, 2, 8))

    @property
    def granularity(self) -> int:
        return 0

    @property
    def biased(self) -> bool:
        return True

    def payload_size(self, length: int) -> int:
        return LIMITS_BYTES + planes_size(length, self.bits)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        low, high = limits(x)
        out[:LIMITS_BYTES] = np.array([low, high], "<f4").view(np.uint8)
        codes = np.zeros((1, x.size), np.uint8)
        if low < high:
            # In float64, where the range neither overflows nor is subnormal.
            offset = x.astype(np.float64) - np.float64(low)
            codes[0] = np.floor(offset * self.levels_per_unit(low, high) + 0.5).astype(np.uint8)
        size = self.payload_size(x.size)
        pack_planes(codes, self.bits, out[LIMITS_BYTES:size].reshape(1, -1))
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        packed = payload[LIMITS_BYTES:].reshape(1, -1)
        combine(out, self.table(payload[:LIMITS_BYTES])[unpack_planes(packed, out.size, self.bits)[0]], mode)

    # -- the arithmetic, which all backends share -----------------------------------------------

    def levels_per_unit(self, low: np.float32, high: np.float32) -> np.float64:
        """What turns a distance from the minimum into a level; ``low < high``."""
        return np.float64(2**self.bits - 1) / (np.float64(high) - np.float64(low))

    def table(self, head: np.ndarray) -> np.ndarray:
        """The value of each code, float32 of shape (2^bits,), from the first bytes of a payload."""
        low, high = np.frombuffer(head.tobytes(), "<f4").astype(np.float64)
        last = 2**self.bits - 1
        with np.errstate(over="ignore", invalid="ignore"):
            return (low + (high - low) * np.arange(last + 1) / last).astype(np.float32)


def limits(x: np.ndarray) -> tuple[np.float32, np.float32]:
    """Minimum and maximum; NaN twice if a value is not finite, zeros for an empty tensor."""
    if not x.size:
        return np.float32(0), np.float32(0)
    # Adding zero makes 0 of -0, of which the minimum of -0 and 0 may be either.
    low, high = x.min() + np.float32(0), x.max() + np.float32(0)
    if np.isfinite(low) and np.isfinite(high):
        return low, high
    not_finite = np.uint32(NAN_BITS).view(np.float32)
    return not_finite, not_finite
