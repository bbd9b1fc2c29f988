"""QSGD on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`.

A bucket is read once from memory: its scale, its codes and their packing all happen while
it sits in the first-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels, mode_number
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NAN_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.intrinsics import (
    add_level,
    dequantize,
    high_half,
    join_bytes,
    level_of,
    low_half,
    move_field,
    offset_level,
    random_word,
)
from hvd_qsgd.kernels.numba.reduce import all_finite, folded, largest_magnitude
from hvd_qsgd.kernels.threads import in_parts

LIFT = np.float32(1 / TINY)
ZERO, ONE = np.float32(0), np.float32(1)
NAN = np.float32(np.nan)


@jit
def bucket_scale(bits, values, use_l2):  # type: ignore[no-untyped-def]
    """Scale of one bucket from its bit patterns (int32) and values (the same memory)."""
    largest = largest_magnitude(bits)
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
    norm = np.float32(np.sqrt(folded(sums)))
    return norm if norm < np.inf else NAN


@jit
def round_halves(first, second, low, high, factor, offset, key_low, key_high, word):  # type: ignore[no-untyped-def]
    """Codes of a bucket's two halves; ``first`` may be one longer. One word serves both.

    Slices instead of offsets: only then does the compiler see that no index wraps around,
    and vectorizes.
    """
    for j in range(len(second)):
        drawn = random_word(np.uint32(word + j), key_low, key_high)
        low[j] = offset_level(first[j] * factor, low_half(drawn), offset)
        high[j] = offset_level(second[j] * factor, high_half(drawn), offset)
    if len(first) > len(second):
        last = len(first) - 1
        drawn = random_word(np.uint32(word + last), key_low, key_high)
        low[last] = offset_level(first[last] * factor, low_half(drawn), offset)


@jit
def round_nearest(values, codes, factor, offset):  # type: ignore[no-untyped-def]
    for j in range(len(values)):
        codes[j] = offset_level(values[j] * factor, np.int32(1 << (FRACTION_BITS - 1)), offset)


@jit
def round_nibbles(first, second, packed, factor, offset, key_low, key_high, word):  # type: ignore[no-untyped-def]
    """:func:`round_halves` and the packing of 4-bit codes in one pass."""
    for j in range(len(second)):
        drawn = random_word(np.uint32(word + j), key_low, key_high)
        low = offset_level(first[j] * factor, low_half(drawn), offset)
        high = offset_level(second[j] * factor, high_half(drawn), offset)
        packed[j] = np.uint8(np.int32(low | np.int32(high << np.int32(4))))


@jit
def round_crumbs(a, b, c, d, packed, factor, offset, key_low, key_high, word):  # type: ignore[no-untyped-def]
    """:func:`round_halves` and the packing of 2-bit codes in one pass over the four quarters."""
    quarter = len(packed)
    for j in range(quarter):
        even = random_word(np.uint32(word + j), key_low, key_high)
        odd = random_word(np.uint32(word + quarter + j), key_low, key_high)
        code = offset_level(a[j] * factor, low_half(even), offset)
        code = np.int32(code | np.int32(offset_level(b[j] * factor, low_half(odd), offset) << np.int32(2)))
        code = np.int32(code | np.int32(offset_level(c[j] * factor, high_half(even), offset) << np.int32(4)))
        code = np.int32(code | np.int32(offset_level(d[j] * factor, high_half(odd), offset) << np.int32(6)))
        packed[j] = np.uint8(code)


@jit
def is_usable(scale):  # type: ignore[no-untyped-def]
    return scale > ZERO and scale < np.float32(np.inf)


@jit
def factor_of(scale, levels):  # type: ignore[no-untyped-def]
    """What turns values of a bucket into fixed point; its scale is not tiny."""
    return np.float32(np.float32(levels << FRACTION_BITS) / scale)


@jit
def bucket_codes(values, scale, codes, levels, stochastic, key_low, key_high, word):  # type: ignore[no-untyped-def]
    """Levels plus s of one bucket into ``codes`` (any integer dtype)."""
    length = len(values)
    if not is_usable(scale):
        codes[:length] = levels
        return
    if scale < TINY:
        values = values * LIFT
        scale = np.float32(scale * LIFT)
    factor = factor_of(scale, levels)
    offset = np.int32(levels << FRACTION_BITS)
    half = (length + 1) // 2
    if stochastic:
        low, high = codes[:half], codes[half:length]
        round_halves(values[:half], values[half:], low, high, factor, offset, key_low, key_high, word)
    else:
        round_nearest(values, codes[:length], factor, offset)


@jit
def plane_size(length, width):  # type: ignore[no-untyped-def]
    return (length * width + 7) // 8


@jit
def pack_bucket(codes, length, bits, out):  # type: ignore[no-untyped-def]
    """Planes of one bucket; returns the bytes written (see codecs.bits.pack_planes)."""
    at = 0
    shift = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        stride = plane_size(length, width)
        plane = out[at : at + stride]
        for slot in range(8 // width):
            part = codes[slot * stride : min((slot + 1) * stride, length)]
            right, mask, left = np.uint8(shift), np.uint8((1 << width) - 1), np.uint8(slot * width)
            if slot == 0:
                for j in range(len(part)):
                    plane[j] = move_field(part[j], right, mask, left)
            else:
                target = plane[: len(part)]
                for j in range(len(part)):
                    target[j] = join_bytes(target[j], move_field(part[j], right, mask, left))
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
        stride = plane_size(length, width)
        for slot in range(8 // width):
            part = codes[slot * stride : min((slot + 1) * stride, length)]
            plane = packed[at : at + len(part)]
            right, mask, left = np.uint8(slot * width), np.uint8((1 << width) - 1), np.uint8(shift)
            if shift == 0:
                for j in range(len(part)):
                    part[j] = move_field(plane[j], right, mask, left)
            else:
                for j in range(len(part)):
                    part[j] = join_bytes(part[j], move_field(plane[j], right, mask, left))
        at += stride
        shift += width
    return at


@jit
def encode(x, out, scales, bits, bucket_size, use_l2, stochastic, key_low, key_high, word):  # type: ignore[no-untyped-def]
    patterns = x.view(np.int32)
    codes = np.empty(bucket_size, np.uint8)
    levels = np.int32((1 << (bits - 1)) - 1)
    offset = np.int32(levels << FRACTION_BITS)
    half = bucket_size // 2
    at = 0
    for bucket in range(len(scales)):
        begin = bucket * bucket_size
        values = x[begin : begin + bucket_size]
        scale = bucket_scale(patterns[begin : begin + bucket_size], values, use_l2)
        scales[bucket] = scale
        first_word = word + bucket * half
        # The common cases have loops of their own, in which the codes never leave the registers.
        common = stochastic and len(values) == bucket_size and scale >= TINY
        if common and bits == 4:
            packed = out[at : at + half]
            factor = factor_of(scale, levels)
            round_nibbles(values[:half], values[half:], packed, factor, offset, key_low, key_high, first_word)
            at += half
        elif common and bits == 2:
            t = half // 2
            packed = out[at : at + t]
            factor = factor_of(scale, levels)
            a, b, c, d = values[:t], values[t:half], values[half : half + t], values[half + t :]
            round_crumbs(a, b, c, d, packed, factor, offset, key_low, key_high, first_word)
            at += t
        elif common and bits == 8:
            low, high = out[at : at + half], out[at + half : at + bucket_size]
            factor = factor_of(scale, levels)
            round_halves(values[:half], values[half:], low, high, factor, offset, key_low, key_high, first_word)
            at += bucket_size
        elif bits == 8:
            packed = out[at : at + len(values)]
            bucket_codes(values, scale, packed, levels, stochastic, key_low, key_high, first_word)
            at += len(values)
        else:
            bucket_codes(values, scale, codes, levels, stochastic, key_low, key_high, first_word)
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
        store_bucket(codes[: len(values)], scales[bucket], unit, levels, values, mode)


@jit
def store_bucket(codes, scale, unit, zero, values, mode):  # type: ignore[no-untyped-def]
    """Dequantize one bucket into ``values``; ``zero`` is the code of level 0."""
    if mode == 0:
        for j in range(len(values)):
            values[j] = dequantize(codes[j], zero, scale, unit)
    elif mode == 1:
        for j in range(len(values)):
            values[j] += dequantize(codes[j], zero, scale, unit)
    else:
        for j in range(len(values)):
            values[j] -= dequantize(codes[j], zero, scale, unit)


@jit
def average(message, scale_starts, code_starts, out, bits, bucket_size):  # type: ignore[no-untyped-def]
    """Mean of payloads whose scales and codes begin there, bucket by bucket: the sums stay in the first-level cache."""
    codes = np.empty(bucket_size, np.uint8)
    scale = np.empty(1, np.float32)
    levels = np.int32((1 << (bits - 1)) - 1)
    unit = ONE / np.float32(levels)
    code_bytes = bucket_size // 8 * bits
    count = np.float32(len(scale_starts))
    for bucket in range((len(out) + bucket_size - 1) // bucket_size):
        values = out[bucket * bucket_size : (bucket + 1) * bucket_size]
        part = codes[: len(values)]
        for rank in range(len(scale_starts)):
            at = scale_starts[rank] + 4 * bucket
            # Copied byte by byte: a payload may stand anywhere.
            scale.view(np.uint8)[:] = message[at : at + 4]
            unpack_bucket(message[code_starts[rank] + bucket * code_bytes :], len(values), bits, part)
            store_bucket(part, scale[0], unit, levels, values, 1 if rank else 0)
        for j in range(len(values)):
            values[j] /= count


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
    at = 0
    for bucket in range(len(scales)):
        values = x[bucket * bucket_size : (bucket + 1) * bucket_size]
        first = word + bucket * (bucket_size // 2)
        bucket_codes(values, scales[bucket], codes, levels, stochastic, key_low, key_high, first)
        stride = (len(values) + lanes - 1) // lanes
        words = out[at : at + stride]
        words[:] = 0
        for lane in range(lanes):
            part = codes[lane * stride : min((lane + 1) * stride, len(values))]
            add_levels(part, words[: len(part)], levels, np.int32(lane * width))
        at += stride


@jit
def add_levels(codes, words, zero, shift):  # type: ignore[no-untyped-def]
    for j in range(len(words)):
        words[j] = add_level(words[j], codes[j], zero, shift)


@jit
def from_lanes(sums, scales, width, ranks, count, out, bits, bucket_size):  # type: ignore[no-untyped-def]
    levels = (1 << (bits - 1)) - 1
    unit = ONE / np.float32(levels * count)
    largest = np.int32(ranks * levels)
    lanes = 32 // width
    mask = np.int32((np.int64(1) << width) - 1)
    total = np.int64(0)
    for lane in range(lanes):
        total += np.int64(largest) << (lane * width)
    offset = np.int32(total)
    at = 0
    for bucket in range(len(scales)):
        values = out[bucket * bucket_size : (bucket + 1) * bucket_size]
        stride = (len(values) + lanes - 1) // lanes
        words = sums[at : at + stride]
        for lane in range(lanes):
            part = values[lane * stride : min((lane + 1) * stride, len(values))]
            read_levels(words[: len(part)], part, offset, np.int32(lane * width), mask, largest, scales[bucket], unit)
        at += stride


@jit
def read_levels(words, values, offset, shift, mask, largest, scale, unit):  # type: ignore[no-untyped-def]
    for j in range(len(words)):
        values[j] = scale * (np.float32(level_of(words[j], offset, shift, mask, largest)) * unit)


@dataclass(frozen=True)
class QSGDKernels(Kernels):
    """Numba implementation of a QSGD codec; see :class:`hvd_qsgd.codecs.base.Kernels`.

    Long vectors are divided between threads (see :mod:`hvd_qsgd.kernels.threads`).
    """

    codec: QSGD

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size = codec.payload_size(x.size)
        # Compiled code writes without looking.
        codec.check_room(out, size)
        scales, codes = self._parts(out[:size], x.size)

        def call(start: int, stop: int) -> None:
            part, draw = self._elements(start, stop), self._draw(key, first, start)
            encode(x[part], codes[self._codes(start, stop)], scales[start:stop], codec.bits, codec.bucket_size, *draw)

        in_parts(x.size, codec.bucket_size, call)
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        codec = self.codec
        codec.check_payload(payload, out.size)
        scales, codes = self._parts(payload, out.size)
        number = mode_number(mode)

        def call(start: int, stop: int) -> None:
            packed, part = codes[self._codes(start, stop)], out[self._elements(start, stop)]
            decode(packed, scales[start:stop], part, codec.bits, codec.bucket_size, number)

        in_parts(out.size, codec.bucket_size, call)

    def prepare_average(
        self, message: np.ndarray, spans: Sequence[tuple[int, int]], length: int
    ) -> Looks[Callable[[np.ndarray], None]]:
        yield from ()
        for start, stop in spans:
            self.codec.check_payload(message[start:stop], length)
        return functools.partial(self._average, message, spans)

    def _average(self, message: np.ndarray, spans: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        codec = self.codec
        scales = np.array([start for start, _ in spans], np.int64)
        codes = scales + 4 * codec.buckets(out.size)

        def call(start: int, stop: int) -> None:
            begin = self._codes(start, stop).start
            part = out[self._elements(start, stop)]
            average(message, scales + 4 * start, codes + begin, part, codec.bits, codec.bucket_size)

        in_parts(out.size, codec.bucket_size, call)

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)

    def agree_into(self, x: np.ndarray, out: np.ndarray) -> None:
        codec = self.codec

        def call(start: int, stop: int) -> None:
            agree(x[self._elements(start, stop)], out[start:stop], codec.bucket_size, codec.norm == "l2")

        in_parts(x.size, codec.bucket_size, call)

    def to_lanes(
        self, x: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, key: int = 0, first: int = 0
    ) -> None:
        codec = self.codec
        width = codec.lane_width(ranks)
        scales, words = agreed.view(np.float32), codec.lanes_length(codec.bucket_size, ranks)

        def call(start: int, stop: int) -> None:
            _, stochastic, *draw = self._draw(key, first, start)
            part, lanes = x[self._elements(start, stop)], out[start * words : stop * words]
            to_lanes(part, scales[start:stop], width, lanes, codec.bits, codec.bucket_size, stochastic, *draw)

        in_parts(x.size, codec.bucket_size, call)

    def from_lanes(self, sums: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, count: int) -> None:
        codec = self.codec
        width = codec.lane_width(ranks)
        scales, words = agreed.view(np.float32), codec.lanes_length(codec.bucket_size, ranks)

        def call(start: int, stop: int) -> None:
            part, lanes = out[self._elements(start, stop)], sums[start * words : stop * words]
            from_lanes(lanes, scales[start:stop], width, ranks, count, part, codec.bits, codec.bucket_size)

        in_parts(out.size, codec.bucket_size, call)

    def _parts(self, payload: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and codes of the payload of ``length`` elements."""
        cut = 4 * self.codec.buckets(length)
        return payload[:cut].view("<f4"), payload[cut:]

    def _elements(self, start: int, stop: int) -> slice:
        """Where the elements of these buckets are; the last may end beyond the vector."""
        return slice(start * self.codec.bucket_size, stop * self.codec.bucket_size)

    def _codes(self, start: int, stop: int) -> slice:
        """The same of their codes."""
        size = self.codec.bucket_size // 8 * self.codec.bits
        return slice(start * size, stop * size)

    def _draw(self, key: int, first: int, bucket: int) -> tuple[bool, bool, np.uint32, np.uint32, int]:
        codec = self.codec
        word = (first // codec.bucket_size + bucket) * (codec.bucket_size // 2)
        stochastic = codec.rounding == "stochastic"
        return codec.norm == "l2", stochastic, np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), word
