"""What the kernels compute with: each function rounds where the specification rounds.

Scales travel as int32 bit patterns, and pass through memory as bytes, because a payload may
stand at any address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_qsgd.codecs import qsgd, random_words

FRACTION_BITS = tl.constexpr(qsgd.FRACTION_BITS)
UNITY = tl.constexpr(1 << qsgd.FRACTION_BITS)
ABS_MASK = tl.constexpr(int(qsgd.ABS_MASK))
INFINITY_BITS = tl.constexpr(qsgd.INFINITY_BITS)
NAN_BITS = tl.constexpr(qsgd.NAN_BITS)
TINY = tl.constexpr(float(qsgd.TINY))
LIFT = tl.constexpr(float(1 / qsgd.TINY))
MULTIPLIER_1 = tl.constexpr(random_words.MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(random_words.MULTIPLIER_2)
#: From here to twice as much float32 has no fractions and is counted by its last bits: adding it rounds to the nearest
#: whole number, ties to even, and putting a whole number into its bits adds that number.
WHOLE = tl.constexpr(float(2**23))
WHOLE_BITS = tl.constexpr(0x4B000000)
WHOLE_MASK = tl.constexpr(2**23 - 1)
#: In the middle of that range, for numbers of both signs, below 2^22 in magnitude.
MIDDLE = tl.constexpr(float(2**23 + 2**22))
MIDDLE_BITS = tl.constexpr(0x4B400000)


@triton.jit
def bits_of(values):  # type: ignore[no-untyped-def]
    """float32 as int32."""
    return values.to(tl.int32, bitcast=True)


@triton.jit
def random_word(index, key_low, key_high):  # type: ignore[no-untyped-def]
    """:func:`hvd_qsgd.codecs.random_words.words`, all arguments and the result uint32."""
    h = index + key_low
    h ^= h >> 16
    h *= MULTIPLIER_1
    h ^= h >> 15
    h += key_high
    h *= MULTIPLIER_2
    return h ^ (h >> 15)


@triton.jit
def factors(scales, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the bit patterns of scales: the two factors that make values fixed point, and whether there are such."""
    usable = (scales > 0) & (scales < INFINITY_BITS)
    scale = scales.to(tl.float32, bitcast=True)
    lift = tl.where(scale < TINY, LIFT, 1.0)
    safe = tl.where(usable, scale * lift, 1.0)
    return lift, tl.div_rn(tl.full(safe.shape, LEVELS * UNITY, tl.float32), safe), usable


@triton.jit
def round_up(values, fractions, lift, factor, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels plus s, int32 in 0..2s; anything where the scale is not usable."""
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    scaled = values * lift * factor
    if BITS < 8:
        # |scaled| is at most s * 2^16, below 2^22.
        return (bits_of(scaled + MIDDLE) + (fractions + (LEVELS * UNITY - MIDDLE_BITS))) >> FRACTION_BITS
    else:
        whole = bits_of(tl.abs(scaled) + WHOLE) & WHOLE_MASK
        fixed = tl.where(scaled < 0, -whole, whole)
        return (fixed + fractions + LEVELS * UNITY) >> FRACTION_BITS


@triton.jit
def levels_at(  # type: ignore[no-untyped-def]
    source,
    index,
    present,
    first_word,
    rows,
    length,
    key_low,
    key_high,
    lift,
    factor,
    usable,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Elements ``index`` of buckets ``rows``, which begin at ``source``, as levels plus s; see ``QSGD._fractions``."""
    values = load_values(source + index, present)
    if STOCHASTIC:
        half = (length + 1) // 2
        late = index >= half
        number = first_word.to(tl.uint32) + rows.to(tl.uint32)[:, None] * half
        number += tl.where(late, index - half, index).to(tl.uint32)
        word = random_word(number, key_low.to(tl.uint32), key_high.to(tl.uint32))
        fractions = tl.where(late, word >> 16, word & 0xFFFF).to(tl.int32)
    else:
        fractions = tl.full(index.shape, UNITY // 2, tl.int32)
    return tl.where(usable, round_up(values, fractions, lift, factor, BITS), 2 ** (BITS - 1) - 1)


@triton.jit
def levels_of(codes, largest):  # type: ignore[no-untyped-def]
    """float32 of ``codes - largest``; codes are below 2^23, and ``largest`` is a constant or a float32."""
    return (codes | WHOLE_BITS).to(tl.float32, bitcast=True) - (largest + WHOLE)


@triton.jit
def dequantize(levels, scales, unit):  # type: ignore[no-untyped-def]
    """:func:`hvd_qsgd.codecs.qsgd.dequantize` of float32 levels and bit patterns of scales; ``unit`` is 1 / largest."""
    return scales.to(tl.float32, bitcast=True) * (levels * unit)


@triton.jit
def scale_of(magnitudes):  # type: ignore[no-untyped-def]
    """Bit patterns of scales of those of magnitudes: what is not finite becomes the one NaN."""
    return tl.where(magnitudes >= INFINITY_BITS, NAN_BITS, magnitudes)


@triton.jit
def bytes_after(starts, columns, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to bytes ``columns`` after ``starts``, which are multiples of 4 if ``ALIGNED``.

    Triton itself looks for multiples of 16, and behind the header of a message, 4 bytes, nothing is one.
    """
    pointers = starts + columns
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, 4])
    return pointers


@triton.jit
def load_scales(pointer, rows, inside, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 words ``rows`` of little-endian bytes."""
    byte = tl.arange(0, 4)[None, :]
    parts = tl.load(bytes_after(pointer + rows[:, None] * 4, byte, ALIGNED), mask=inside[:, None], other=0)
    return tl.sum(parts.to(tl.int32) << (8 * byte), axis=1)


@triton.jit
def store_scales(pointer, rows, scales, inside):  # type: ignore[no-untyped-def]
    """The inverse of :func:`load_scales`, at any address."""
    byte = tl.arange(0, 4)[None, :]
    tl.store(pointer + rows[:, None] * 4 + byte, (scales[:, None] >> (8 * byte)).to(tl.uint8), mask=inside[:, None])


@triton.jit
def load_values(source, inside):  # type: ignore[no-untyped-def]
    """float32 of what is there: float32, float16 or bfloat16; 0 where not ``inside``."""
    values = tl.load(source, mask=inside, other=0.0)
    if values.dtype == tl.bfloat16:
        # By its bits, which keeps subnormals whatever a conversion does with them.
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def store_values(target, values, inside):  # type: ignore[no-untyped-def]
    """Store float32 values, rounded to the type that is there, ties to even."""
    if target.dtype.element_ty == tl.bfloat16:
        bits = bits_of(values)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & ABS_MASK) > INFINITY_BITS, NAN_BITS >> 16, rounded)
        tl.store(target, rounded.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(target, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def plane_stride(length, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes of the plane of a bucket; see :func:`hvd_qsgd.codecs.bits.pack_planes`."""
    return (length * WIDTH + 7) // 8


@triton.jit
def code_bytes(length, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes of all planes of a bucket: :func:`hvd_qsgd.codecs.bits.planes_size`."""
    size = 0
    for power in tl.static_range(4):
        if BITS & (8 >> power):
            size += plane_stride(length, 8 >> power)
    return size
