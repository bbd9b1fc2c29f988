"""The kernel that reads payloads of QSGD."""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_qsgd.kernels.triton.arithmetic import (
    bytes_after,
    code_bytes,
    dequantize,
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
    levels = codes - (2 ** (BITS - 1) - 1)
    return dequantize(levels, load_scales(scales_in, rows, within, ALIGNED)[:, None], unit)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The payloads of all ranks, ``step`` bytes apart, are read once, and the result is written once.

    ``MODE`` is one of :data:`hvd_qsgd.codecs.base.MODES`, for one payload, or "average".
    ``ALIGNED`` says that the codes of each bucket begin at a multiple of 4 bytes.
    """
    length = LENGTH if LENGTH > 0 else tail
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (index < length)
    values = payload_values(scales_in, codes_in, rows, index, within, inside, length, unit, BITS, ALIGNED)
    target = out + rows.to(tl.int64)[:, None] * length + index
    if MODE == "add":
        values = load_values(target, inside) + values
    elif MODE == "subtract":
        values = load_values(target, inside) - values
    elif MODE == "average":
        for _ in range(1, ranks):
            scales_in += step
            codes_in += step
            values += payload_values(scales_in, codes_in, rows, index, within, inside, length, unit, BITS, ALIGNED)
        values = tl.div_rn(values, count)
    store_values(target, values, inside)
