"""Kernels that find the largest of many magnitudes without sorting them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_digits(  # type: ignore[no-untyped-def]
    magnitudes, prefix, counts, length, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to ``counts`` how often each digit occurs among the magnitudes whose bits above it are ``prefix``."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(magnitudes + index, mask=index < length, other=-1)
    chosen = (magnitude >= 0) & ((magnitude >> (SHIFT + BITS)) == tl.load(prefix))
    here = tl.histogram((magnitude >> SHIFT) & ((1 << BITS) - 1), 1 << BITS, mask=chosen)
    tl.atomic_add(counts + tl.arange(0, 1 << BITS), here, mask=here > 0, sem="relaxed")


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
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(magnitudes + index, mask=index < length, other=-1)
    limit = tl.load(threshold)
    most = tl.load(needed)
    greater = (magnitude > limit).to(tl.int32)
    same = (magnitude == limit).to(tl.int32)
    same_before = tl.load(equal + block) + tl.cumsum(same, axis=0) - same
    place = tl.load(above + block) + tl.cumsum(greater, axis=0) - greater + tl.minimum(same_before, most)
    kept = (greater > 0) | ((same > 0) & (same_before < most))
    tl.store(positions + place, index, mask=kept)
