"""Sign: one bit a value, and the mean magnitude of each bucket.

Source: Karimireddy et al., Error feedback fixes SignSGD, ICML 2019 (arXiv 1901.09847),
Algorithm 1: C(v) = ||v||_1 / d * sign(v), here for every bucket of d values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_integer, combine
from hvd_qsgd.codecs.qsgd import row_sums
from hvd_qsgd.errors import ConfigError


@dataclass(frozen=True)
class Sign(Codec):
    """Send the sign of each value; all of a bucket decode to plus or minus its mean magnitude.

    Args:
        bucket_size: consecutive elements that share a scale; a multiple of 8, 8..65536.

    It keeps at least the share ``||v||_1^2 / (d ||v||_2^2)`` of the squared norm of a bucket, so
    error feedback around it converges. The sign of zero counts as plus. A bucket that holds
    NaN or an infinity decodes to NaN.

    Raises:
        ConfigError: a value is out of range.
    """

    bucket_size: int = 512

    name: ClassVar[str] = "sign"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bucket_size", check_integer("Sign", "bucket_size", self.bucket_size, 8, 65536))
        if self.bucket_size % 8:
            raise ConfigError(f"Sign: bucket_size={self.bucket_size} must be a multiple of 8.")

    @property
    def granularity(self) -> int:
        return self.bucket_size

    @property
    def biased(self) -> bool:
        return True

    def buckets(self, length: int) -> int:
        """Number of buckets of ``length`` elements; the last one may be short."""
        return -(-length // self.bucket_size)

    def payload_size(self, length: int) -> int:
        return 4 * self.buckets(length) + -(-length // 8)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        """See :meth:`Kernels.encode_into`. Payload: the scales, then the bit map of negative values from bit 0 up."""
        size, at = self.payload_size(x.size), 4 * self.buckets(x.size)
        self.check_room(out, size)
        out[:at] = self.scales(x).astype("<f4").view(np.uint8)
        out[at:size] = np.packbits(x < 0, bitorder="little")
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        at = 4 * self.buckets(out.size)
        scales = np.repeat(np.frombuffer(payload[:at].tobytes(), "<f4"), self.bucket_size)[: out.size]
        negative = np.unpackbits(payload[at:], count=out.size, bitorder="little").astype(bool)
        combine(out, np.where(negative, -scales, scales), mode)

    def scales(self, x: np.ndarray) -> np.ndarray:
        """The mean magnitude of each bucket, float32; NaN where a bucket is not finite.

        Magnitudes are added in float64 like the squares of :func:`hvd_qsgd.codecs.qsgd.l2_norms`.
        """
        full = x.size // self.bucket_size * self.bucket_size
        scales = np.empty(self.buckets(x.size), np.float32)
        scales[: full // self.bucket_size] = mean_magnitudes(x[:full].reshape(-1, self.bucket_size))
        if full < x.size:
            scales[-1:] = mean_magnitudes(x[full:].reshape(1, -1))
        return scales


def mean_magnitudes(rows: np.ndarray) -> np.ndarray:
    """The mean magnitude of each row, float32."""
    with np.errstate(invalid="ignore"):
        means = (row_sums(np.abs(rows).astype(np.float64)) / rows.shape[1]).astype(np.float32)
    return np.where(np.isfinite(means), means, np.float32(np.nan))
