"""TopK of every row on the CPU, all rows in a few calls. The bytes are specified by :mod:`hvd_qsgd.codecs.rows`.

The rows of a batch are short: calls for each of them would take longer than the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from hvd_qsgd.codecs.base import mode_number
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.codecs.rows import Rows, RowsKernels
from hvd_qsgd.codecs.topk import HEADER, INFINITY_BITS, LARGEST_HALF, NOT_FINITE, TopK, form_size, smallest_form
from hvd_qsgd.kernels.numba.cast import from_half, to_half
from hvd_qsgd.kernels.numba.compiling import jit
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
def read_heads(payload, spans, length, last, value_bytes, counts):  # type: ignore[no-untyped-def]
    """How many values each row has, up to the first row without a payload of its own; returns its number.

    Rows have ``length`` elements, the last one ``last``.
    """
    for row in range(len(spans)):
        part = payload[spans[row, 0] : spans[row, 1]]
        elements = length if row < len(spans) - 1 else last
        if len(part) < HEAD or part[0] > NOT_FINITE or part[1] > 32:
            return row
        form, low_bits, count = np.int64(part[0]), np.int64(part[1]), np.int64(0)
        for byte in range(4):
            count |= np.int64(part[4 + byte]) << (8 * byte)
        size = HEAD
        if form != NOT_FINITE:
            size += count * value_bytes + size_of_positions(elements, count, form, low_bits)
        if count > elements or len(part) != size:
            return row
        counts[row] = SPOILED if form == NOT_FINITE else count
    return len(spans)


@jit
def read(payload, spans, length, last, value_bytes, counts, places, values):  # type: ignore[no-untyped-def]
    """Positions and values of all rows, up to the first whose positions cannot be; returns its number."""
    done = 0
    for row in range(len(counts)):
        part, count = payload[spans[row, 0] : spans[row, 1]], max(counts[row], 0)
        at = HEAD + count * value_bytes
        of_row = places[done : done + count]
        if unpack_positions(part[at:], of_row, np.int64(part[0]), np.int64(part[1])) != count:
            return row
        if not ascending_below(of_row, length if row < len(spans) - 1 else last):
            return row
        if value_bytes == 4:
            values[done : done + count].view(np.uint8)[:] = part[HEAD:at]
        else:
            for i in range(count):
                values[done + i] = from_half(part[HEAD + 2 * i] | np.uint32(part[HEAD + 2 * i + 1]) << 8)
        done += count
    return len(counts)


@jit
def combine_rows(counts, places, values, length, out, mode):  # type: ignore[no-untyped-def]
    done = 0
    for row in range(len(counts)):
        target, count = out[row * length : (row + 1) * length], max(counts[row], 0)
        if counts[row] == SPOILED:
            target[:] = np.float32(np.nan)
        elif mode == 0:
            target[:] = 0
        scatter(places[done : done + count], values[done : done + count], target, mode)
        done += count


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

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        value_bytes = self.inner.codec.value_bytes
        table = payload[: self.codec.sizes_bytes(length)]
        spans = np.array(self.codec.spans(table, length, len(payload)), np.int64).reshape(-1, 2)
        shape = self.codec.length, length - self.codec.length * (len(spans) - 1), value_bytes
        counts = np.empty(len(spans), np.int64)
        good = counts[: read_heads(payload, spans, *shape, counts)]
        room = int(np.maximum(good, 0).sum())
        places, values = np.empty(room, np.int64), np.empty(room, np.float32)
        if read(payload, spans, *shape, good, places, values) < len(spans):
            # The kernels for one row know what to say of it.
            return (yield from super().prepare_decode(payload, length))
        return functools.partial(self._combine, counts, places, values)

    def _combine(self, counts: np.ndarray, places: np.ndarray, values: np.ndarray, out: np.ndarray, mode: str) -> None:
        combine_rows(counts, places, values, self.codec.length, out, mode_number(mode))

    def _value_bytes(self, values: np.ndarray) -> np.ndarray:
        if self.inner.codec.values == "float16":
            halves = np.empty(len(values), np.uint16)
            to_half(np.clip(values, -LARGEST_HALF, LARGEST_HALF).view(np.uint32), halves)
            return halves.view(np.uint8)
        return values.view(np.uint8)
