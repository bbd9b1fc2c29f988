"""TopK on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.topk`.

Selection is exact: a threshold guessed from a sample lets one pass gather little more than
the k largest, and only those few are ordered. Where the guess proves wrong, a histogram
over exponent and leading mantissa bits gives a threshold that is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels, mode_number
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.codecs.topk import (
    BITMAP,
    GAPS,
    HEADER,
    INFINITY_BITS,
    LARGEST_HALF,
    NOT_FINITE,
    PLAIN,
    TopK,
    combine_nan,
    form_size,
    smallest_form,
)
from hvd_qsgd.errors import PayloadError
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.reduce import all_finite, largest_magnitude

#: Magnitudes have 31 bits; the bins take the upper 11 of them.
BIN_SHIFT = 20
BINS = 1 << (31 - BIN_SHIFT)
BLOCK = 64
#: About how many elements the first guess of the threshold is made from.
SAMPLE = 1 << 14


@jit
def gather_block(patterns, start, lowest, positions, found):  # type: ignore[no-untyped-def]
    for i in range(len(patterns)):
        if patterns[i] & np.int32(0x7FFFFFFF) >= lowest:
            if found < len(positions):
                positions[found] = start + i
            found += 1
    return found


@jit
def gather(patterns, lowest, positions):  # type: ignore[no-untyped-def]
    """Positions of the magnitudes of at least ``lowest``, ascending, as far as they fit.

    Returns how many there are. Blocks without any, which are most of them, cost no more than
    their maximum.
    """
    found = 0
    for start in range(0, len(patterns), BLOCK):
        block = patterns[start : start + BLOCK]
        if largest_magnitude(block) >= lowest:
            found = gather_block(block, start, lowest, positions, found)
    return found


@jit
def histogram(patterns, counts):  # type: ignore[no-untyped-def]
    """Count magnitudes by bin."""
    for i in range(len(patterns)):
        counts[(patterns[i] & np.int32(0x7FFFFFFF)) >> BIN_SHIFT] += 1


def guessed_threshold(patterns: np.ndarray, wanted: int) -> int:
    """A magnitude that a little more than ``wanted`` elements probably reach, from a sample."""
    sample = patterns[:: max(len(patterns) // SAMPLE, 1)] & np.int32(0x7FFFFFFF)
    expected = wanted * len(sample) / max(len(patterns), 1)
    # Four standard deviations more than expected, so that the guess is seldom too high.
    rank = min(int(expected + 4 * expected**0.5 + 4), len(sample) - 1)
    return int(np.partition(sample, len(sample) - 1 - rank)[len(sample) - 1 - rank])


def candidates(patterns: np.ndarray, wanted: int) -> np.ndarray:
    """Ascending positions of non-zero elements, the ``wanted`` largest and all NaN and infinities among them."""
    if not wanted:
        return np.empty(0, np.int64)
    positions = np.empty(min(2 * wanted + SAMPLE, len(patterns)), np.int64)
    found = gather(patterns, np.int32(max(guessed_threshold(patterns, wanted), 1)), positions)
    if wanted <= found <= len(positions):
        return positions[:found]
    counts = np.zeros(BINS, np.int64)
    histogram(patterns, counts)
    at_least = np.cumsum(counts[::-1])[::-1]
    lowest_bin = int(np.flatnonzero(at_least >= wanted)[-1])
    # Zeros share the lowest bin with the smallest numbers, but are never gathered.
    positions = np.empty(at_least[lowest_bin], np.int64)
    return positions[: gather(patterns, np.int32(max(lowest_bin << BIN_SHIFT, 1)), positions)]


@jit
def keep_largest(magnitudes, threshold, equal, positions):  # type: ignore[no-untyped-def]
    """Compact ``positions`` to those above the threshold and the first ``equal`` at it."""
    kept = 0
    for i in range(len(magnitudes)):
        if magnitudes[i] > threshold or (magnitudes[i] == threshold and equal > 0):
            equal -= magnitudes[i] == threshold
            positions[kept] = positions[i]
            kept += 1


@jit
def pack_bits_at(out, at, value, width):  # type: ignore[no-untyped-def]
    """Or ``width`` bits of ``value`` into a zeroed bit stream at bit ``at``."""
    while width > 0:
        room = 8 - (at & 7)
        out[at >> 3] |= (value << (at & 7)) & 0xFF
        value >>= room
        width -= room
        at += room


@jit
def read_bits_at(data, at, width):  # type: ignore[no-untyped-def]
    value = np.int64(0)
    taken = 0
    while taken < width:
        value |= np.int64(data[at >> 3] >> (at & 7)) << taken
        step = 8 - (at & 7)
        taken += step
        at += step
    return value & ((np.int64(1) << width) - 1)


@jit
def pack_positions(positions, out, form, low_bits):  # type: ignore[no-untyped-def]
    """See :func:`hvd_qsgd.codecs.topk.pack_positions`."""
    out[:] = 0
    count = len(positions)
    high = ((count * low_bits + 7) // 8) * 8
    mask = (np.int64(1) << low_bits) - 1
    for i in range(count):
        position = np.int64(positions[i])
        if form == BITMAP:
            out[position >> 3] |= 1 << (position & 7)
        else:
            pack_bits_at(out, i * low_bits, position & mask, low_bits)
            if form == GAPS:
                mark = high + (position >> low_bits) + i
                out[mark >> 3] |= 1 << (mark & 7)


@jit
def unpack_positions(data, positions, form, low_bits):  # type: ignore[no-untyped-def]
    """The inverse of :func:`pack_positions`; returns how many positions the payload marks."""
    count = len(positions)
    if form == PLAIN:
        for i in range(count):
            positions[i] = read_bits_at(data, i * low_bits, low_bits)
        return count
    high = (count * low_bits + 7) // 8
    found = 0
    for byte in range(high, len(data)):
        bits = data[byte]
        slot = 0
        while bits:
            if bits & 1:
                if found == count:
                    return count + 1
                mark = np.int64((byte - high) * 8 + slot)
                if form == GAPS:
                    mark = ((mark - found) << low_bits) | read_bits_at(data, found * low_bits, low_bits)
                positions[found] = mark
                found += 1
            bits >>= 1
            slot += 1
    return found


@jit
def ascending_below(positions, length):  # type: ignore[no-untyped-def]
    last = np.int64(-1)
    for i in range(len(positions)):
        if positions[i] <= last or positions[i] >= length:
            return False
        last = positions[i]
    return True


@jit
def scatter(positions, values, out, mode):  # type: ignore[no-untyped-def]
    for i in range(len(positions)):
        if mode == 2:
            out[positions[i]] -= values[i]
        else:
            out[positions[i]] += values[i]


def combine_at(positions: np.ndarray, values: np.ndarray, out: np.ndarray, mode: str) -> None:
    """:func:`hvd_qsgd.codecs.topk.combine_at`."""
    number = mode_number(mode)
    if mode == "set":
        out[...] = 0
    scatter(positions, values, out, number)


@dataclass(frozen=True)
class TopKKernels(Kernels):
    """Numba implementation of a TopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: TopK

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        patterns = x.view(np.int32)
        wanted = self.codec.kept(x.size)
        positions = candidates(patterns, wanted)
        magnitudes = patterns[positions] & np.int32(0x7FFFFFFF)
        if len(magnitudes) and magnitudes.max() >= INFINITY_BITS:
            return self.codec.write_not_finite(out)
        count = min(wanted, len(positions))
        if count:
            threshold = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
            keep_largest(magnitudes, threshold, count - int((magnitudes > threshold).sum()), positions)
        positions = positions[:count]
        return self.write(x, positions, out)

    def write(self, x: np.ndarray, positions: np.ndarray, out: np.ndarray) -> int:
        """:meth:`hvd_qsgd.codecs.topk.TopK.write`."""
        count = len(positions)
        form, low_bits = smallest_form(x.size, count)
        out[: HEADER.size] = np.frombuffer(HEADER.pack(form, low_bits, count), np.uint8)
        values = x[positions]
        if self.codec.values == "float16":
            values = np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype("<f2")
        at = HEADER.size + values.nbytes
        out[HEADER.size : at] = values.view(np.uint8)
        end = at + form_size(x.size, count, form, low_bits)
        self.codec.check_room(out, end)
        pack_positions(positions, out[at:end], form, low_bits)
        return end

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        yield from ()
        codec = self.codec
        form, low_bits, count = codec.check_header(payload, length, len(payload))
        if form == NOT_FINITE:
            return combine_nan
        end = HEADER.size + count * codec.value_bytes
        values = codec.unpack_values(payload[HEADER.size : end])
        positions = np.empty(count, np.int64)
        marked = unpack_positions(payload[end:], positions, form, low_bits)
        if marked != count:
            raise PayloadError(f"A topk payload announces {count} values, but does not mark {count} positions.")
        if not ascending_below(positions, length):
            raise PayloadError(f"A topk payload of {length} elements holds positions not ascending or too large.")
        return functools.partial(combine_at, positions, values)

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
