"""Kernels behind the allreduce exchange: levels on agreed scales, in lanes of int32 words."""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_qsgd.kernels.triton.arithmetic import dequantize, factors, levels_at, levels_of, load_scales, store_values


@triton.jit(do_not_specialize=["tail", "buckets", "first_word", "key_low", "key_high"])
def to_lanes(  # type: ignore[no-untyped-def]
    x,
    agreed,
    out,
    buckets,
    tail,
    first_word,
    key_low,
    key_high,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    LANE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each word gathers the elements of its lanes of ``LANE`` bits; see ``QSGD.to_lanes``."""
    length = LENGTH if LENGTH > 0 else tail
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    LANES: tl.constexpr = 32 // LANE
    stride = (length + LANES - 1) // LANES
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (columns < stride)
    lift, factor, usable = factors(load_scales(agreed, rows, within, True)[:, None], LEVELS)
    source = x + rows.to(tl.int64)[:, None] * length
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for lane in tl.static_range(LANES):
        index = columns + lane * stride
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
        sums += tl.where(present, code - LEVELS, 0) << (lane * LANE)
    tl.store(out + rows.to(tl.int64)[:, None] * stride + columns, sums, mask=inside)


@triton.jit(do_not_specialize=["tail", "buckets", "offset", "largest"])
def from_lanes(  # type: ignore[no-untyped-def]
    sums,
    agreed,
    out,
    buckets,
    tail,
    offset,
    largest,
    unit,
    LENGTH: tl.constexpr,
    LANE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of levels as values; see ``QSGD.from_lanes``."""
    length = LENGTH if LENGTH > 0 else tail
    LANES: tl.constexpr = 32 // LANE
    stride = (length + LANES - 1) // LANES
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = rows < buckets
    inside = within[:, None] & (index < length)
    words = tl.load(sums + rows.to(tl.int64)[:, None] * stride + index % stride, mask=inside, other=0)
    digits = ((words + offset).to(tl.uint32, bitcast=True) >> (index // stride * LANE).to(tl.uint32)) & (
        (1 << LANE) - 1
    )
    digits = digits.to(tl.int32, bitcast=True)
    levels = levels_of(digits, largest.to(tl.float32)) if LANE < 23 else (digits - largest).to(tl.float32)
    values = dequantize(levels, load_scales(agreed, rows, within, True)[:, None], unit)
    store_values(out + rows.to(tl.int64)[:, None] * length + index, values, inside)
