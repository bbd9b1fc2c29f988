"""QSGD: bucketed quantization with unbiased stochastic rounding.

Source: Alistarh et al., QSGD, NeurIPS 2017 (arXiv 1610.02132), section 3.1 (quantizer)
and section 4 (bucketing, maximum norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_choice, check_integer, combine
from hvd_qsgd.codecs.bits import pack_planes, planes_size, unpack_planes
from hvd_qsgd.codecs.random_words import words
from hvd_qsgd.errors import ConfigError, UnsupportedError

#: Bits of the random number that decides a rounding. Elements are rounded from fixed point
#: with this many fractional bits, which biases a level by at most 2^-17.
FRACTION_BITS = 16
#: Buckets whose scale is below TINY are multiplied by 1 / TINY first, because s / scale would
#: overflow float32. Both are powers of two, so the multiplication is exact.
TINY = np.float32(2.0**-100)
ABS_MASK = np.uint32(0x7FFFFFFF)
INFINITY_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
#: Independent float64 sums of the L2 norm; a fixed number makes it the same on every backend.
NORM_LANES = 16


@dataclass(frozen=True)
class QSGD(Codec):
    """Quantize buckets of a gradient to ``bits`` bits a value.

    Args:
        bits: 2..8, counting the sign: levels are -s..s with ``s = 2^(bits-1) - 1``.
        bucket_size: consecutive elements that share a scale; a multiple of 8, 8..65536.
        norm: the scale of a bucket, "max" (largest magnitude) or "l2" (Euclidean norm).
        rounding: "stochastic" (unbiased) or "nearest" (ties go towards plus infinity).

    A bucket that holds NaN or an infinity decodes to NaN; a bucket of zeros decodes to zeros.
    With max norm the expected squared error of a bucket of d values of magnitude up to M is
    at most d M^2 / (4 s^2); with L2 norm it is at most min(d/s^2, sqrt(d)/s) times the squared
    norm (Lemma 3.1).

    Raises:
        ConfigError: a value is out of range.

    Examples:
        >>> codec = QSGD(bits=4, rounding="nearest")
        >>> payload = codec.encode(np.array([0.4, -7.0, 3.0, 0.0, 1.6, 0.2], np.float32))
        >>> len(payload)  # a scale of 4 bytes, and 6 codes of 4 bits
        7
        >>> codec.decode(payload, (6,)).round().tolist()
        [0.0, -7.0, 3.0, 0.0, 2.0, 0.0]
    """

    bits: int = 4
    bucket_size: int = 512
    norm: str = "max"
    rounding: str = "stochastic"

    name: ClassVar[str] = "qsgd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_integer("QSGD", "bits", self.bits, 2, 8))
        object.__setattr__(self, "bucket_size", check_integer("QSGD", "bucket_size", self.bucket_size, 8, 65536))
        if self.bucket_size % 8:
            below = self.bucket_size // 8 * 8
            raise ConfigError(
                f"QSGD: bucket_size={self.bucket_size} must be a multiple of 8, so that a bucket fills whole bytes: "
                f"use {below} or {below + 8}."
            )
        check_choice("QSGD", "norm", self.norm, ("max", "l2"))
        check_choice("QSGD", "rounding", self.rounding, ("stochastic", "nearest"))

    @property
    def levels(self) -> int:
        """s, the largest level."""
        return 2 ** (self.bits - 1) - 1

    @property
    def granularity(self) -> int:
        return self.bucket_size

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def variance_bound(self) -> float:
        """Lemma 3.1 (ii): bound of E||Q(v)-v||^2 / ||v||^2 for a bucket with L2 norm."""
        d, s = self.bucket_size, self.levels
        return min(d / s**2, d**0.5 / s)

    @property
    def omega(self) -> float:
        # With max norm an error is at most one level, whatever is fed back: residuals stay bounded.
        return self.variance_bound() if self.norm == "l2" and self.rounding == "stochastic" else 0.0

    @property
    def one_level(self) -> bool:
        return self.levels == 1 and self.rounding == "stochastic"

    # -- sizes ---------------------------------------------------------------------------

    def buckets(self, length: int) -> int:
        """Number of buckets of ``length`` elements; the last one may be short."""
        return -(-length // self.bucket_size)

    def payload_size(self, length: int) -> int:
        full, tail = divmod(length, self.bucket_size)
        codes = full * planes_size(self.bucket_size, self.bits) + planes_size(tail, self.bits)
        return 4 * self.buckets(length) + codes

    # -- payload: all scales as little-endian float32, then the codes of each bucket --------

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        all_scales = self.scales(x)
        at = 4 * len(all_scales)
        out[:at] = all_scales.astype("<f4").view(np.uint8)
        for rows, scales, bucket in self._rows(x, all_scales, first):
            codes = (self._levels(rows, scales, key, bucket) + self.levels).astype(np.uint8)
            packed = np.empty((rows.shape[0], planes_size(rows.shape[1], self.bits)), np.uint8)
            pack_planes(codes, self.bits, packed)
            out[at : at + packed.size] = packed.reshape(-1)
            at += packed.size
        return at

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        at = 4 * self.buckets(out.size)
        all_scales = np.frombuffer(payload[:at].tobytes(), "<f4")
        for rows, scales, _ in self._rows(out, all_scales, 0):
            stride = planes_size(rows.shape[1], self.bits)
            packed = payload[at : at + rows.shape[0] * stride].reshape(rows.shape[0], stride)
            levels = unpack_planes(packed, rows.shape[1], self.bits).astype(np.int32) - self.levels
            combine(rows, dequantize(levels, scales, self.levels), mode)
            at += packed.size

    # -- LaneCodec: levels on agreed scales, summed in lanes of int32 words ------------------

    def lane_width(self, ranks: int) -> int:
        """Bits of a lane: the smallest w with ``ranks * 2s < 2^w``."""
        width = int(ranks * 2 * self.levels).bit_length()
        if width > 32:
            raise UnsupportedError(
                f"The sum of {ranks} ranks' {self.bits}-bit levels needs lanes of {width} bits, and a lane has 32 "
                f"at most. Use fewer bits or the scatter_gather exchange."
            )
        return width

    def lanes_length(self, length: int, ranks: int) -> int:
        """int32 words that ``length`` elements take; each bucket starts a new one."""
        lanes = 32 // self.lane_width(ranks)
        full, tail = divmod(length, self.bucket_size)
        return full * -(-self.bucket_size // lanes) + -(-tail // lanes)

    def agreement_length(self, length: int) -> int:
        """int32 words whose maximum over ranks makes the common scales."""
        return self.buckets(length)

    def agree_into(self, x: np.ndarray, out: np.ndarray) -> None:
        """The bit patterns of the scales: for non-negative floats they order like the values,
        and NaN is above them all, so an integer maximum agrees on the scales."""
        out[...] = self.scales(x).view(np.int32)

    def to_lanes(
        self, x: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, key: int = 0, first: int = 0
    ) -> None:
        """Round on the agreed scales and add the levels into lanes.

        The levels of a bucket that takes W words go to the words 0 .. W-1 in lane 0, then to the
        same words in lane 1, and so on. A word is the sum of ``level * 2^(w * lane)`` over its
        lanes, with signed levels. It equals the packing of offset levels 0..2s less a constant,
        cannot overflow int32 when ``ranks`` words are added, and a rank that contributes zero
        bits contributes level 0.
        """
        width = self.lane_width(ranks)
        lanes = 32 // width
        weights = np.int64(1) << (np.int64(width) * np.arange(lanes, dtype=np.int64))
        at = 0
        for rows, scales, bucket in self._rows(x, agreed.view(np.float32), first):
            count, length = rows.shape
            stride = -(-length // lanes)
            levels = np.zeros((count, lanes * stride), np.int64)
            levels[:, :length] = self._levels(rows, scales, key, bucket)
            words = (levels.reshape(count, lanes, stride) * weights[:, None]).sum(axis=1)
            out[at : at + words.size] = words.astype(np.int32).reshape(-1)
            at += words.size

    def from_lanes(self, sums: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, count: int) -> None:
        """The sum of the levels of ``ranks`` ranks as values, divided by ``count``."""
        width = self.lane_width(ranks)
        lanes = 32 // width
        largest = ranks * self.levels
        shifts = (np.uint32(width) * np.arange(lanes, dtype=np.uint32)).astype(np.uint32)
        offset = sum(largest << (width * lane) for lane in range(lanes)) & 0xFFFFFFFF
        mask = np.uint32((1 << width) - 1)
        at = 0
        for rows, scales, _ in self._rows(out, agreed.view(np.float32), 0):
            buckets, length = rows.shape
            stride = -(-length // lanes)
            with np.errstate(over="ignore"):
                unsigned = sums[at : at + buckets * stride].view(np.uint32) + np.uint32(offset)
            digits = (unsigned.reshape(buckets, 1, stride) >> shifts[:, None]) & mask
            levels = digits.reshape(buckets, -1)[:, :length].astype(np.int64) - largest
            rows[...] = dequantize(levels, scales, self.levels * count)
            at += buckets * stride

    # -- the arithmetic ---------------------------------------------------------------------

    def scales(self, x: np.ndarray) -> np.ndarray:
        """The scale of each bucket of ``x``, float32 of shape (buckets,); NaN where a bucket is not finite."""
        scales = np.empty(self.buckets(x.size), np.float32)
        for rows, part, _ in self._rows(x, scales, 0):
            largest = (rows.view(np.uint32) & ABS_MASK).max(axis=1)
            part[:] = largest.view(np.float32) if self.norm == "max" else l2_norms(rows)
            part[(largest >= INFINITY_BITS) | np.isinf(part)] = np.uint32(NAN_BITS).view(np.float32)
        return scales

    def _rows(self, x: np.ndarray, scales: np.ndarray, first: int):  # type: ignore[no-untyped-def]
        """Views of the full buckets, then of the tail: (rows, scales, number of the first bucket)."""
        full = x.size // self.bucket_size
        bucket = first // self.bucket_size
        cut = full * self.bucket_size
        if full:
            yield x[:cut].reshape(full, self.bucket_size), scales[:full], bucket
        if cut < x.size:
            yield x[cut:].reshape(1, -1), scales[full:], bucket + full

    def _levels(self, rows: np.ndarray, scales: np.ndarray, key: int, bucket: int) -> np.ndarray:
        """Levels of whole buckets, int32 of the shape of ``rows``."""
        s = self.levels
        unusable = ~((scales > 0) & (scales < np.inf))
        tiny = scales < TINY
        lift = np.where(tiny, 1 / TINY, np.float32(1)).astype(np.float32)
        safe = np.where(unusable, np.float32(1), scales * lift)
        factor = (np.float32(s << FRACTION_BITS) / safe).astype(np.float32)
        usable = np.where(unusable[:, None], np.float32(0), rows)
        fixed = np.rint((usable * lift[:, None]) * factor[:, None]).astype(np.int32)
        value = fixed + self._fractions(rows.shape, key, bucket) + (s << FRACTION_BITS)
        # No clipping: for |x| <= scale the two roundings above never exceed s * 2^16 (tested for all mantissas).
        return (value >> FRACTION_BITS) - s

    def _fractions(self, shape: tuple[int, ...], key: int, bucket: int) -> np.ndarray:
        """What is added before the fraction is dropped: int32 in 0..65535."""
        rows, length = shape
        if self.rounding == "nearest":
            return np.full(shape, 1 << (FRACTION_BITS - 1), np.int32)
        # One word serves two elements: its low half the element in the first half of the
        # bucket, its high half the element as far into the second half.
        per_bucket = self.bucket_size // 2
        half = -(-length // 2)
        drawn = words(key, bucket * per_bucket, rows * per_bucket).reshape(rows, per_bucket)[:, :half]
        pairs = np.concatenate([drawn & np.uint32(0xFFFF), drawn >> np.uint32(16)], axis=1)
        return pairs[:, :length].astype(np.int32)


def dequantize(levels: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    """float32 values ``scale * (level * (1 / largest))``, rounded after each operation."""
    unit = np.float32(1) / np.float32(largest)
    with np.errstate(invalid="ignore"):
        return scales[:, None] * (levels.astype(np.float32) * unit)


def l2_norms(rows: np.ndarray) -> np.ndarray:
    """Euclidean norm of each row, float32; the squares of float32 values are exact in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(row_sums(np.square(rows.astype(np.float64)))).astype(np.float32)


def row_sums(rows: np.ndarray) -> np.ndarray:
    """The sum of each row of a float64 matrix.

    Element ``j`` is added to sum ``j mod 16``, and the sums are folded in halves. The order is
    fixed, so every backend gets the same bits.
    """
    count, length = rows.shape
    padded = np.zeros((count, -(-length // NORM_LANES) * NORM_LANES), np.float64)
    padded[:, :length] = rows
    sums = np.zeros((count, NORM_LANES), np.float64)
    for start in range(0, padded.shape[1], NORM_LANES):
        sums += padded[:, start : start + NORM_LANES]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
