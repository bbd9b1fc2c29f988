"""Kernels that read payloads of QSGD."""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_qsgd.kernels.triton.arithmetic import (
    bytes_after,
    code_bytes,
    dequantize,
    levels_of,
    load_scales,
    load_values,
    plane_stride,
    store_values,
)


@triton.jit
def payload_values(  # type: ignore[no-untyped-def]
    scales_in, codes_in, rows, index, within, inside, length, unit, BITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Elements ``index`` of buckets ``rows`` of one payload."""
    source = codes_in + rows.to(tl.int64)[:, None] * code_bytes(length, BITS)
    codes = tl.zeros(inside.shape, tl.int32)
    for power in tl.static_range(4):
        if BITS & (8 >> power):
            stride = plane_stride(length, 8 >> power)
            byte = tl.load(bytes_after(source, index % stride, ALIGNED), mask=inside, other=0).to(tl.int32)
            field = (byte >> (index // stride * (8 >> power))) & ((1 << (8 >> power)) - 1)
            codes |= field << (BITS & (16 - (16 >> power)))
            source += stride
    levels = levels_of(codes, 2 ** (BITS - 1) - 1)
    return dequantize(levels, load_scales(scales_in, rows, within, ALIGNED)[:, None], unit)


@triton.jit(do_not_specialize=["buckets", "ranks"])
def decode_buckets(  # type: ignore[no-untyped-def]
    scales_in,
    codes_in,
    out,
    buckets,
    ranks,
    step,
    unit,
    count,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BUCKET: tl.constexpr,
    MODE: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Full buckets, as :func:`decode` reads them, in the eight parts that ``encode_buckets`` writes: no byte twice."""
    PART: tl.constexpr = BUCKET // 8
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (columns < PART)
    start = rows.to(tl.int64)[:, None] * (PART * BITS)
    values = bucket_values(scales_in, codes_in + start, rows, columns, within, inside, unit, BITS, PART, ALIGNED)
    if MODE == "average":
        for _ in range(1, ranks):
            scales_in += step
            codes_in += step
            more = bucket_values(scales_in, codes_in + start, rows, columns, within, inside, unit, BITS, PART, ALIGNED)
            values = add(values, more)
    target = out + rows.to(tl.int64)[:, None] * BUCKET + columns
    for part in tl.static_range(8):
        merge(target + part * PART, values[part], inside, count, MODE, HALVES)


@triton.jit
def bucket_values(  # type: ignore[no-untyped-def]
    scales_in,
    codes_in,
    rows,
    columns,
    within,
    inside,
    unit,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Eight parts of the elements of buckets."""
    codes = (0, 0, 0, 0, 0, 0, 0, 0)
    if BITS & 8:
        codes = with_plane(codes, codes_in, columns, inside, 8, 0, PART, ALIGNED)
    if BITS & 4:
        codes = with_plane(codes, codes_in, columns, inside, 4, BITS & 8, PART, ALIGNED)
    if BITS & 2:
        codes = with_plane(codes, codes_in, columns, inside, 2, BITS & 12, PART, ALIGNED)
    if BITS & 1:
        codes = with_plane(codes, codes_in, columns, inside, 1, BITS & 14, PART, ALIGNED)
    scales = load_scales(scales_in, rows, within, ALIGNED)[:, None]
    values = ()
    for part in tl.static_range(8):
        value = dequantize(levels_of(codes[part], 2 ** (BITS - 1) - 1), scales, unit)
        values = values + (value,)  # type: ignore[assignment]
    return values


@triton.jit
def with_plane(  # type: ignore[no-untyped-def]
    codes,
    codes_in,
    columns,
    inside,
    WIDTH: tl.constexpr,
    WIDER: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Eight parts of codes with what a plane has of them; see ``store_plane``."""
    bytes_ = ()
    for part in tl.static_range(WIDTH):
        place = bytes_after(codes_in + (WIDER + part) * PART, columns, ALIGNED)
        bytes_ = bytes_ + (tl.load(place, mask=inside, other=0).to(tl.int32),)  # type: ignore[assignment]
    found = ()
    for part in tl.static_range(8):
        field = (bytes_[part % WIDTH] >> (part // WIDTH * WIDTH)) & ((1 << WIDTH) - 1)
        found = found + (codes[part] | (field << WIDER),)  # type: ignore[assignment]
    return found


@triton.jit
def merge(target, values, inside, count, MODE: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store decoded values, or what ``MODE`` makes of them; see :func:`decode`."""
    if MODE == "add":
        values = load_values(target, inside) + values
    elif MODE == "subtract":
        values = load_values(target, inside) - values
    elif MODE == "average":
        # Over a power of two the product with the inverse is the same, and takes a tenth of the time.
        values = values * count if HALVES else tl.div_rn(values, count)
    store_values(target, values, inside)


@triton.jit
def add(first, second):  # type: ignore[no-untyped-def]
    """Sums of eight parts."""
    sums = ()
    for part in tl.static_range(8):
        sums = sums + (first[part] + second[part],)  # type: ignore[assignment]
    return sums


@triton.jit(do_not_specialize=["tail", "buckets", "ranks"])
def decode(  # type: ignore[no-untyped-def]
    scales_in,
    codes_in,
    out,
    buckets,
    tail,
    ranks,
    step,
    unit,
    count,
    ALIGNED: tl.constexpr,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The payloads of all ranks, ``step`` bytes apart, are read once, and the result is written once.

    ``MODE`` is one of :data:`hvd_qsgd.codecs.base.MODES`, for one payload, or "average": over ``count``, which is
    handed over as its inverse where that is exact, and ``HALVES`` says so.
    ``ALIGNED`` says that the codes of each bucket begin at a multiple of 4 bytes.
    """
    length = LENGTH if LENGTH > 0 else tail
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (index < length)
    values = payload_values(scales_in, codes_in, rows, index, within, inside, length, unit, BITS, ALIGNED)
    if MODE == "average":
        for _ in range(1, ranks):
            scales_in += step
            codes_in += step
            values += payload_values(scales_in, codes_in, rows, index, within, inside, length, unit, BITS, ALIGNED)
    merge(out + rows.to(tl.int64)[:, None] * length + index, values, inside, count, MODE, HALVES)
