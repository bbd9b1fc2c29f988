"""Kernels that find the largest of many magnitudes without sorting them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_digits(  # type: ignore[no-untyped-def]
    magnitudes,
    prefix,
    counts,
    length,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Add to ``counts`` how often each digit occurs among the magnitudes whose bits above it are ``prefix``.

    There are ``COPIES`` of the counts, because programs that add to one word wait for each other.
    """
    program = tl.program_id(0)
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(magnitudes + index, mask=index < length, other=-1)
    chosen = (magnitude >= 0) & ((magnitude >> (SHIFT + BITS)) == tl.load(prefix))
    digit = (magnitude >> SHIFT) & ((1 << BITS) - 1)
    tl.atomic_add(counts + (program % COPIES << BITS) + digit, 1, mask=chosen, sem="relaxed")


@triton.jit
def count_chosen(magnitudes, threshold, above, equal, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many magnitudes of each block are above the threshold, and how many equal it."""
    block = tl.program_id(0)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(magnitudes + index, mask=index < length, other=-1)
    limit = tl.load(threshold)
    tl.store(above + block, tl.sum((magnitude > limit).to(tl.int32), axis=0))
    tl.store(equal + block, tl.sum((magnitude == limit).to(tl.int32), axis=0))


@triton.jit
def write_chosen(  # type: ignore[no-untyped-def]
    magnitudes, threshold, needed, above, equal, positions, length, BLOCK: tl.constexpr
):
    """Positions, ascending, of all magnitudes above the threshold and of the first ``needed`` that equal it.

    ``above`` and ``equal`` count those of the blocks before.
    """
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    magnitude = tl.load(magnitudes + first + index, mask=first + index < length, other=-1)
    limit = tl.load(threshold)
    most = tl.load(needed)
    equal_before = tl.load(equal + block)
    start = positions + tl.load(above + block) + tl.minimum(equal_before, most)
    # How many of those that equal the threshold are taken here.
    taken = tl.minimum(tl.maximum(most - equal_before, 0), BLOCK).to(tl.int32)
    greater = magnitude > limit
    same = magnitude == limit
    # Two sums in one: neither reaches 2^16.
    either = greater.to(tl.int32) + (same.to(tl.int32) << 16)
    before = tl.cumsum(either, axis=0) - either
    same_before = before >> 16
    place = (before & 0xFFFF) + tl.minimum(same_before, taken)
    tl.store(start + place, first + index, mask=greater | (same & (same_before < taken)))
