"""TopK of every row on the CPU, all rows in a few calls. The bytes are specified by :mod:`hvd_qsgd.codecs.rows`.

The rows of a batch are short: calls for each of them would take longer than the work.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from hvd_qsgd.codecs.base import mode_number
from hvd_qsgd.codecs.rows import Rows, RowsKernels
from hvd_qsgd.codecs.topk import HEADER, INFINITY_BITS, LARGEST_HALF, NOT_FINITE, TopK, form_size, smallest_form
from hvd_qsgd.kernels.numba.cast import from_half, to_half
from hvd_qsgd.kernels.numba.reduce import largest_magnitude
from hvd_qsgd.kernels.numba.topk import (
    BIN_SHIFT,
    BINS,
    TopKKernels,
    ascending_below,
    histogram,
    pack_positions,
    scatter,
    unpack_positions,
)

jit = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
size_of_positions = jit(form_size)
HEAD = HEADER.size
#: Instead of the number of values of a row that holds NaN or an infinity.
SPOILED = -1


@jit
def threshold_of(patterns, wanted, bins):  # type: ignore[no-untyped-def]
    """The magnitude of the ``wanted``-th largest, and how many of just this magnitude are among those."""
    bins[:] = 0
    histogram(patterns, bins)
    chosen, left = BINS - 1, wanted
    while bins[chosen] < left:
        left -= bins[chosen]
        chosen -= 1
    inside = np.empty(bins[chosen], np.int32)
    found = 0
    for i in range(len(patterns)):
        magnitude = np.int32(patterns[i] & np.int32(0x7FFFFFFF))
        if magnitude >> BIN_SHIFT == chosen:
            inside[found] = magnitude
            found += 1
    threshold = np.partition(inside, found - left)[found - left]
    return threshold, left - np.sum(inside > threshold)


@jit
def select(patterns, length, kept, tail_kept, counts, places, values):  # type: ignore[no-untyped-def]
    """How many values of each row are kept, where they stand in it, and their patterns; returns their number."""
    bins = np.empty(BINS, np.int64)
    done = 0
    for row in range(len(counts)):
        part = patterns[row * length : (row + 1) * length]
        wanted = min(kept if len(part) == length else tail_kept, np.sum(part & np.int32(0x7FFFFFFF) != 0))
        counts[row] = wanted
        if largest_magnitude(part) >= INFINITY_BITS:
            counts[row] = SPOILED
        elif wanted:
            threshold, equal = threshold_of(part, wanted, bins)
            for i in range(len(part)):
                magnitude = np.int32(part[i] & np.int32(0x7FFFFFFF))
                if magnitude > threshold or (magnitude == threshold and equal > 0):
                    equal -= magnitude == threshold
                    places[done], values[done] = i, part[i]
                    done += 1
    return done


@jit
def write(counts, places, values, value_bytes, forms, ends, out):  # type: ignore[no-untyped-def]
    """Payloads that end at ``ends``, the first one at the start of ``out``; ``values`` are bytes."""
    start = done = 0
    for row in range(len(counts)):
        payload, count = out[start : ends[row]], max(counts[row], 0)
        payload[0], payload[1], payload[2], payload[3] = forms[row, 0], forms[row, 1], 0, 0
        for byte in range(4):
            payload[4 + byte] = (count >> (8 * byte)) & 0xFF
        at = HEAD + count * value_bytes
        payload[HEAD:at] = values[done * value_bytes : (done + count) * value_bytes]
        pack_positions(places[done : done + count], payload[at:], forms[row, 0], forms[row, 1])
        start, done = ends[row], done + count


@jit
def read(payload, spans, length, value_bytes, out, mode):  # type: ignore[no-untyped-def]
    """Decode rows up to the first without finite values, or without a payload of its own; returns its number."""
    for row in range(len(spans)):
        part, target = payload[spans[row, 0] : spans[row, 1]], out[row * length : (row + 1) * length]
        if len(part) < HEAD or part[0] >= NOT_FINITE or part[1] > 32:
            return row
        form, low_bits, count = np.int64(part[0]), np.int64(part[1]), np.int64(0)
        for byte in range(4):
            count |= np.int64(part[4 + byte]) << (8 * byte)
        at = HEAD + count * value_bytes
        if count > len(target) or len(part) != at + size_of_positions(len(target), count, form, low_bits):
            return row
        places = np.empty(count, np.int64)
        if unpack_positions(part[at:], places, form, low_bits) != count or not ascending_below(places, len(target)):
            return row
        values = np.empty(count, np.float32)
        if value_bytes == 4:
            values.view(np.uint8)[:] = part[HEAD:at]
        else:
            for i in range(count):
                values[i] = from_half(part[HEAD + 2 * i] | np.uint32(part[HEAD + 2 * i + 1]) << 8)
        if mode == 0:
            target[:] = 0
        scatter(places, values, target, mode)
    return len(spans)


@functools.lru_cache(maxsize=4096)
def form_and_size(length: int, count: int, value_bytes: int) -> tuple[int, int, int]:
    """The first two bytes of a row's payload, and how many it has."""
    if count == SPOILED:
        return NOT_FINITE, 0, HEAD
    form, low_bits = smallest_form(length, count)
    return form, low_bits, HEAD + count * value_bytes + form_size(length, count, form, low_bits)


class RowsTopKKernels(RowsKernels):
    """Numba implementation of TopK by row; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    inner: TopKKernels

    def __init__(self, codec: Rows) -> None:
        assert isinstance(codec.inner, TopK)
        super().__init__(codec, TopKKernels(codec.inner))

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec, length = self.inner.codec, self.codec.length
        full, tail = divmod(len(x), length)
        lengths = [length] * full + [tail] * (tail > 0)
        kept, tail_kept = codec.kept(length), codec.kept(tail)
        room = full * kept + (tail > 0) * tail_kept
        counts, places, values = np.empty(len(lengths), np.int64), np.empty(room, np.int64), np.empty(room, np.int32)
        done = select(x.view(np.int32), length, kept, tail_kept, counts, places, values)
        data = self._value_bytes(values[:done].view(np.float32))
        rows = [form_and_size(*row, codec.value_bytes) for row in zip(lengths, counts.tolist())]
        forms = np.array(rows, np.int64).reshape(-1, 3)
        table = self.codec.sizes_bytes(len(x))
        ends = np.cumsum(forms[:, 2])
        size = table + int(ends[-1]) if rows else table
        codec.check_room(out, size)
        out[:table] = forms[:, 2].astype("<u4").view(np.uint8)
        write(counts, places, data, codec.value_bytes, forms, ends, out[table:size])
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        length, number = self.codec.length, mode_number(mode)
        table = payload[: self.codec.sizes_bytes(len(out))]
        spans = np.array(self.codec.spans(table, len(out), len(payload)), np.int64).reshape(-1, 2)
        row = 0
        while row < len(spans):
            row += read(payload, spans[row:], length, self.inner.codec.value_bytes, out[row * length :], number)
            if row < len(spans):
                # The kernels for one row know what to make of it, or what to say.
                start, stop = spans[row]
                self.inner.decode_into(payload[start:stop], out[row * length : (row + 1) * length], mode)
                row += 1

    def _value_bytes(self, values: np.ndarray) -> np.ndarray:
        if self.inner.codec.values == "float16":
            halves = np.empty(len(values), np.uint16)
            to_half(np.clip(values, -LARGEST_HALF, LARGEST_HALF).view(np.uint32), halves)
            return halves.view(np.uint8)
        return values.view(np.uint8)
