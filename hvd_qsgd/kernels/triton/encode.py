"""Kernels that make scales, codes and payloads of QSGD."""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_qsgd.codecs import qsgd
from hvd_qsgd.kernels.triton.arithmetic import (
    ABS_MASK,
    bits_of,
    bytes_after,
    code_bytes,
    factors,
    levels_at,
    load_scales,
    load_values,
    plane_stride,
    random_word,
    round_up,
    scale_of,
    store_scales,
)

HALF = tl.constexpr(1 << (qsgd.FRACTION_BITS - 1))
NORM_LANES = tl.constexpr(qsgd.NORM_LANES)


@triton.jit(do_not_specialize=["first_word", "key_low", "key_high", "buckets"])
def encode_buckets(  # type: ignore[no-untyped-def]
    x,
    scales_out,
    codes_out,
    buckets,
    first_word,
    key_low,
    key_high,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BUCKET: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Full buckets with max norm, read once: they stay in registers as eight parts of equal length.

    All codes of a byte, and both elements of a random word, are then at the same place of
    different parts, so that nothing moves between threads but the maximum. ``ALIGNED`` says that
    the codes of each begin at a multiple of 4 bytes.
    """
    PART: tl.constexpr = BUCKET // 8
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (columns < PART)
    source = x + rows.to(tl.int64)[:, None] * BUCKET + columns
    values = ()
    magnitudes = tl.zeros([ROWS, COLUMNS], tl.int32)
    for part in tl.static_range(8):
        value = load_values(source + part * PART, inside)
        values = values + (value,)  # type: ignore[assignment]
        magnitudes = tl.maximum(magnitudes, bits_of(value) & ABS_MASK)
    scales = scale_of(tl.max(magnitudes, axis=1))
    store_scales(scales_out, rows, scales, within)

    lift, factor, usable = factors(scales[:, None], LEVELS)
    word = first_word.to(tl.uint32) + rows.to(tl.uint32)[:, None] * (BUCKET // 2) + columns.to(tl.uint32)
    early = ()
    late = ()
    for part in tl.static_range(4):
        if STOCHASTIC:
            drawn = random_word(word + part * PART, key_low.to(tl.uint32), key_high.to(tl.uint32))
            low = (drawn & 0xFFFF).to(tl.int32)
            high = (drawn >> 16).to(tl.int32)
        else:
            low = tl.full([ROWS, COLUMNS], HALF, tl.int32)
            high = low
        early = early + (round_up(values[part], low, lift, factor, BITS),)  # type: ignore[assignment]
        late = late + (round_up(values[part + 4], high, lift, factor, BITS),)  # type: ignore[assignment]

    target = bytes_after(codes_out + rows.to(tl.int64)[:, None] * (PART * BITS), columns, ALIGNED)
    if BITS & 8:
        store_plane(early + late, usable, target, inside, 8, 0, BITS, PART)
    if BITS & 4:
        store_plane(early + late, usable, target, inside, 4, BITS & 8, BITS, PART)
    if BITS & 2:
        store_plane(early + late, usable, target, inside, 2, BITS & 12, BITS, PART)
    if BITS & 1:
        store_plane(early + late, usable, target, inside, 1, BITS & 14, BITS, PART)


@triton.jit
def store_plane(  # type: ignore[no-untyped-def]
    codes, usable, target, inside, WIDTH: tl.constexpr, WIDER: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr
):
    """One plane of eight parts of codes; of level 0 where the scale is not ``usable``.

    ``WIDER`` bits of each code are in the planes before it.
    """
    # Each field of a byte, of level 0.
    ZEROS: tl.constexpr = (((2 ** (BITS - 1) - 1) >> WIDER) & (2**WIDTH - 1)) * (255 // (2**WIDTH - 1))
    for part in tl.static_range(WIDTH):
        byte = field(codes[part], WIDTH, WIDER, BITS)
        for slot in tl.static_range(1, 8 // WIDTH):
            byte |= field(codes[part + slot * WIDTH], WIDTH, WIDER, BITS) << (slot * WIDTH)
        tl.store(target + (WIDER + part) * PART, tl.where(usable, byte, ZEROS).to(tl.uint8), mask=inside)


@triton.jit
def field(codes, WIDTH: tl.constexpr, WIDER: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``WIDTH`` bits of each code; nothing stands above the last ones."""
    shifted = codes >> WIDER
    if WIDER + WIDTH < BITS:
        shifted &= (1 << WIDTH) - 1
    return shifted


@triton.jit(do_not_specialize=["tail", "buckets"])
def bucket_scales(  # type: ignore[no-untyped-def]
    x, out, buckets, tail, LENGTH: tl.constexpr, L2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Scales of buckets of ``LENGTH`` elements, or of one of ``tail`` elements where that is 0."""
    length = LENGTH if LENGTH > 0 else tail
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = rows < buckets
    source = x + rows.to(tl.int64)[:, None] * length
    if L2:
        # The order of the sums is that of the specification: element j to sum j mod 16, then folded in halves.
        lanes = tl.arange(0, NORM_LANES)[None, :]
        sums = tl.zeros([ROWS, NORM_LANES], tl.float64)
        for start in range(0, length, NORM_LANES):
            inside = within[:, None] & (start + lanes < length)
            value = load_values(source + start + lanes, inside).to(tl.float64)
            sums += value * value
        sums = tl.sum(tl.reshape(sums, [ROWS, 2, 8]), axis=1)
        sums = tl.sum(tl.reshape(sums, [ROWS, 2, 4]), axis=1)
        sums = tl.sum(tl.reshape(sums, [ROWS, 2, 2]), axis=1)
        norms = tl.sqrt(tl.sum(sums, axis=1)).to(tl.float32)
        scales = scale_of(bits_of(norms) & ABS_MASK)
    else:
        columns = tl.arange(0, COLUMNS)[None, :]
        magnitudes = tl.zeros([ROWS, COLUMNS], tl.int32)
        for start in range(0, length, COLUMNS):
            inside = within[:, None] & (start + columns < length)
            value = load_values(source + start + columns, inside)
            magnitudes = tl.maximum(magnitudes, bits_of(value) & ABS_MASK)
        scales = scale_of(tl.max(magnitudes, axis=1))
    store_scales(out, rows, scales, within)


@triton.jit(do_not_specialize=["tail", "buckets", "first_word", "key_low", "key_high"])
def encode_scaled(  # type: ignore[no-untyped-def]
    x,
    scales_in,
    codes_out,
    buckets,
    tail,
    first_word,
    key_low,
    key_high,
    ALIGNED: tl.constexpr,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes of buckets of any length whose scales are known: each byte gathers its elements."""
    length = LENGTH if LENGTH > 0 else tail
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = rows < buckets
    lift, factor, usable = factors(load_scales(scales_in, rows, within, ALIGNED)[:, None], LEVELS)
    source = x + rows.to(tl.int64)[:, None] * length
    target = codes_out + rows.to(tl.int64)[:, None] * code_bytes(length, BITS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for power in tl.static_range(4):
        if BITS & (8 >> power):
            stride = plane_stride(length, 8 >> power)
            inside = within[:, None] & (columns < stride)
            bytes_ = tl.zeros([ROWS, COLUMNS], tl.int32)
            for slot in tl.static_range(1 << power):
                index = columns + slot * stride
                present = inside & (index < length)
                code = levels_at(
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
                    BITS,
                    STOCHASTIC,
                )
                part = (code >> (BITS & (16 - (16 >> power)))) & ((1 << (8 >> power)) - 1)
                bytes_ |= tl.where(present, part << (slot * (8 >> power)), 0)
            tl.store(bytes_after(target, columns, ALIGNED), bytes_.to(tl.uint8), mask=inside)
            target += stride
