"""QSGD on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`.

A bucket is read once from memory: its scale, its codes and their packing all happen while
it sits in the first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from hvd_qsgd.codecs.base import MODES
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NAN_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.kernels.numba.intrinsics import high_half, low_half, offset_level, random_word

LIFT = np.float32(1 / TINY)
ZERO, ONE = np.float32(0), np.float32(1)
NAN = np.float32(np.nan)
jit = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


@jit
def bucket_scale(bits, values, use_l2):  # type: ignore[no-untyped-def]
    """Scale of one bucket from its bit patterns (int32) and values (the same memory)."""
    largest = np.int32(0)
    for i in range(len(bits)):
        # As an integer the maximum vectorizes without fastmath, and NaN or Inf wins it.
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    if largest >= INFINITY_BITS:
        return NAN
    if not use_l2:
        scale = np.empty(1, np.int32)
        scale[0] = largest
        return scale.view(np.float32)[0]
    sums = np.zeros(NORM_LANES, np.float64)
    whole = len(values) // NORM_LANES * NORM_LANES
    for start in range(0, whole, NORM_LANES):
        for lane in range(NORM_LANES):
            value = np.float64(values[start + lane])
            sums[lane] += value * value
    for lane in range(len(values) - whole):
        value = np.float64(values[whole + lane])
        sums[lane] += value * value
    half = NORM_LANES // 2
    while half:
        for lane in range(half):
            sums[lane] += sums[lane + half]
        half //= 2
    norm = np.float32(np.sqrt(sums[0]))
    return norm if norm < np.inf else NAN


@jit
def bucket_codes(values, scale, codes, levels, stochastic, key_low, key_high, word):  # type: ignore[no-untyped-def]
    """Levels plus s of one bucket into ``codes`` (any integer dtype)."""
    length = len(values)
    if not (scale > ZERO and scale < np.float32(np.inf)):
        codes[:length] = levels
        return
    lift = ONE
    if scale < TINY:
        lift = LIFT
        scale = np.float32(scale * LIFT)
    factor = np.float32(np.float32(levels << FRACTION_BITS) / scale)
    offset = np.int32(levels << FRACTION_BITS)
    top = np.int32(((2 * levels + 1) << FRACTION_BITS) - 1)
    half = (length + 1) // 2
    if stochastic:
        # Two plain loops over halves that do not overlap: both vectorize.
        for j in range(length - half):
            drawn = random_word(np.uint32(word + j), key_low, key_high)
            codes[j] = offset_level(values[j] * lift * factor, low_half(drawn), offset, top)
            codes[half + j] = offset_level(values[half + j] * lift * factor, high_half(drawn), offset, top)
        if length % 2:
            drawn = random_word(np.uint32(word + half - 1), key_low, key_high)
            codes[half - 1] = offset_level(values[half - 1] * lift * factor, low_half(drawn), offset, top)
    else:
        for j in range(length):
            codes[j] = offset_level(values[j] * lift * factor, np.int32(1 << (FRACTION_BITS - 1)), offset, top)


@jit
def pack_bucket(codes, length, bits, out):  # type: ignore[no-untyped-def]
    """Planes of one bucket; returns the bytes written (see codecs.bits.pack_planes)."""
    at = 0
    shift = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        stride = (length * width + 7) // 8
        mask = (1 << width) - 1
        for j in range(stride):
            out[at + j] = (codes[j] >> shift) & mask
        for slot in range(1, 8 // width):
            start = slot * stride
            left = shift
            for j in range(min(stride, length - start)):
                out[at + j] |= ((codes[start + j] >> left) & mask) << (slot * width)
        at += stride
        shift += width
    return at


@jit
def unpack_bucket(packed, length, bits, codes):  # type: ignore[no-untyped-def]
    """The inverse of :func:`pack_bucket`; returns the bytes read."""
    at = 0
    shift = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        stride = (length * width + 7) // 8
        mask = (1 << width) - 1
        for slot in range(8 // width):
            start = slot * stride
            count = min(stride, length - start)
            if shift == 0:
                for j in range(count):
                    codes[start + j] = (packed[at + j] >> (slot * width)) & mask
            else:
                for j in range(count):
                    codes[start + j] |= ((packed[at + j] >> (slot * width)) & mask) << shift
        at += stride
        shift += width
    return at


@jit
def encode(x, out, scales, bits, bucket_size, use_l2, stochastic, key_low, key_high, word):  # type: ignore[no-untyped-def]
    patterns = x.view(np.int32)
    codes = np.empty(bucket_size, np.uint8)
    levels = np.int32((1 << (bits - 1)) - 1)
    at = 0
    for bucket in range(len(scales)):
        begin = bucket * bucket_size
        values = x[begin : begin + bucket_size]
        scale = bucket_scale(patterns[begin : begin + bucket_size], values, use_l2)
        scales[bucket] = scale
        bucket_codes(values, scale, codes, levels, stochastic, key_low, key_high, word + bucket * (bucket_size // 2))
        at += pack_bucket(codes, len(values), bits, out[at:])


@jit
def decode(packed, scales, out, bits, bucket_size, mode):  # type: ignore[no-untyped-def]
    codes = np.empty(bucket_size, np.uint8)
    levels = np.int32((1 << (bits - 1)) - 1)
    unit = ONE / np.float32(levels)
    at = 0
    for bucket in range(len(scales)):
        values = out[bucket * bucket_size : (bucket + 1) * bucket_size]
        at += unpack_bucket(packed[at:], len(values), bits, codes)
        store_bucket(codes, scales[bucket], unit, levels, values, mode)


@jit
def store_bucket(codes, scale, unit, zero, values, mode):  # type: ignore[no-untyped-def]
    """Dequantize one bucket into ``values``; ``zero`` is the code of level 0."""
    if mode == 0:
        for j in range(len(values)):
            values[j] = scale * (np.float32(np.int32(codes[j]) - zero) * unit)
    elif mode == 1:
        for j in range(len(values)):
            values[j] += scale * (np.float32(np.int32(codes[j]) - zero) * unit)
    else:
        for j in range(len(values)):
            values[j] -= scale * (np.float32(np.int32(codes[j]) - zero) * unit)


@jit
def agree(x, out, bucket_size, use_l2):  # type: ignore[no-untyped-def]
    patterns = x.view(np.int32)
    scales = out.view(np.float32)
    for bucket in range(len(out)):
        begin, end = bucket * bucket_size, (bucket + 1) * bucket_size
        scales[bucket] = bucket_scale(patterns[begin:end], x[begin:end], use_l2)
        if np.isnan(scales[bucket]):
            out[bucket] = NAN_BITS


@jit
def to_lanes(x, scales, width, out, bits, bucket_size, stochastic, key_low, key_high, word):  # type: ignore[no-untyped-def]
    codes = np.empty(bucket_size, np.int32)
    levels = np.int32((1 << (bits - 1)) - 1)
    lanes = 32 // width
    lane = 0
    at = 0
    total = np.int64(0)
    for bucket in range(len(scales)):
        values = x[bucket * bucket_size : (bucket + 1) * bucket_size]
        first = word + bucket * (bucket_size // 2)
        bucket_codes(values, scales[bucket], codes, levels, stochastic, key_low, key_high, first)
        for j in range(len(values)):
            total += np.int64(codes[j] - levels) << (lane * width)
            lane += 1
            if lane == lanes:
                out[at] = np.int32(total)
                at += 1
                lane = 0
                total = np.int64(0)
    if lane:
        out[at] = np.int32(total)


@jit
def from_lanes(sums, scales, width, ranks, count, out, bits, bucket_size):  # type: ignore[no-untyped-def]
    levels = (1 << (bits - 1)) - 1
    unit = ONE / np.float32(levels * count)
    lanes = 32 // width
    mask = (np.int64(1) << width) - 1
    offset = np.int64(0)
    for lane in range(lanes):
        offset += np.int64(ranks * levels) << (lane * width)
    lane = 0
    at = 0
    word = np.int64(sums[0]) + offset if len(sums) else np.int64(0)
    for bucket in range(len(scales)):
        scale = scales[bucket]
        values = out[bucket * bucket_size : (bucket + 1) * bucket_size]
        for j in range(len(values)):
            if lane == lanes:
                at += 1
                lane = 0
                word = np.int64(sums[at]) + offset
            level = ((word >> (lane * width)) & mask) - ranks * levels
            values[j] = scale * (np.float32(level) * unit)
            lane += 1


@dataclass(frozen=True)
class QSGDKernels:
    """Numba implementation of a QSGD codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: QSGD

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size = codec.payload_size(x.size)
        cut = 4 * codec.buckets(x.size)
        encode(x, out[cut:size], out[:cut].view("<f4"), codec.bits, codec.bucket_size, *self._draw(key, first))
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        codec = self.codec
        codec.check_payload(payload, out.size)
        cut = 4 * codec.buckets(out.size)
        scales = payload[:cut].view("<f4")
        decode(payload[cut:], scales, out, codec.bits, codec.bucket_size, MODES.index(mode))

    def agree_into(self, x: np.ndarray, out: np.ndarray) -> None:
        agree(x, out, self.codec.bucket_size, self.codec.norm == "l2")

    def to_lanes(
        self, x: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, key: int = 0, first: int = 0
    ) -> None:
        codec = self.codec
        _, stochastic, low, high, word = self._draw(key, first)
        width = codec.lane_width(ranks)
        scales = agreed.view(np.float32)
        to_lanes(x, scales, width, out, codec.bits, codec.bucket_size, stochastic, low, high, word)

    def from_lanes(self, sums: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, count: int) -> None:
        codec = self.codec
        width = codec.lane_width(ranks)
        from_lanes(sums, agreed.view(np.float32), width, ranks, count, out, codec.bits, codec.bucket_size)

    def _draw(self, key: int, first: int) -> tuple[bool, bool, np.uint32, np.uint32, int]:
        codec = self.codec
        word = first // codec.bucket_size * (codec.bucket_size // 2)
        stochastic = codec.rounding == "stochastic"
        return codec.norm == "l2", stochastic, np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), word
