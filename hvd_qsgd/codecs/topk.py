"""TopK: the k values of largest magnitude and where they stand.

Source: Aji and Heafield, Sparse communication for distributed gradient descent, EMNLP 2017
(arXiv 1704.05021); Stich et al., Sparsified SGD with memory, NeurIPS 2018 (arXiv 1809.07599).
Positions: Elias, Efficient storage and retrieval by content and address of static files,
JACM 1974 (high parts in unary, low parts verbatim).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_choice, check_integer, combine
from hvd_qsgd.codecs.bits import pack_stream, unpack_stream
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.errors import ConfigError, PayloadError

#: form, bits of a low part, two reserved zero bytes, number of values; little-endian.
HEADER = struct.Struct("<BBxxI")
PLAIN, BITMAP, GAPS, NOT_FINITE = range(4)
ABS_MASK = np.uint32(0x7FFFFFFF)
INFINITY_BITS = 0x7F800000
LARGEST_HALF = np.float32(65504)


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the ``k`` values of largest magnitude of each tensor.

    Args:
        ratio: share of the values to keep, 0 < ratio <= 1; ``k = max(1, round(ratio * n))``.
        k: number of values to keep, instead of ``ratio``.
        values: dtype of the values sent, "float32" or "float16" (saturates at 65504).

    Of equal magnitudes the one that stands first is kept; zeros are never sent. Positions
    are sent in the smallest of three forms (see :func:`position_sizes`). A tensor that holds
    NaN or an infinity decodes to NaN as a whole.

    Raises:
        ConfigError: a value is out of range.

    Examples:
        >>> codec = TopK(k=2)
        >>> payload = codec.encode(np.array([0.5, -1.0, 0.25, 0.0, 2.0, -0.125], np.float32))
        >>> codec.decode(payload, (6,)).tolist()
        [0.0, -1.0, 0.0, 0.0, 2.0, 0.0]
    """

    ratio: float | None = 0.01
    k: int | None = None
    values: str = "float32"

    name: ClassVar[str] = "topk"
    variable_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None:
            object.__setattr__(self, "k", check_integer("TopK", "k", self.k, 1, 2**32 - 1))
            # A given k replaces the default ratio; equal settings must compare equal.
            object.__setattr__(self, "ratio", None)
        elif isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ConfigError(
                f"TopK: ratio={self.ratio!r} must be a number above 0 and at most 1 (0.01 keeps 1 %); or give k."
            )
        check_choice("TopK", "values", self.values, ("float32", "float16"))

    @property
    def granularity(self) -> int:
        return 0

    @property
    def biased(self) -> bool:
        return True

    @property
    def value_bytes(self) -> int:
        return 4 if self.values == "float32" else 2

    def kept(self, length: int) -> int:
        """How many of ``length`` values are kept at most."""
        wanted = self.k if self.k is not None else max(1, round((self.ratio or 0) * length))
        return min(wanted, length)

    def payload_size(self, length: int) -> int:
        count = self.kept(length)
        return HEADER.size + count * self.value_bytes + min(position_sizes(length, count)[0][:2])

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        magnitudes = x.view(np.uint32) & ABS_MASK
        if x.size and magnitudes.max() >= INFINITY_BITS:
            return self.write_not_finite(out)
        positions = largest_positions(magnitudes, min(self.kept(x.size), int(np.count_nonzero(magnitudes))))
        return self.write(x, positions, out)

    @staticmethod
    def write_not_finite(out: np.ndarray) -> int:
        """Write the payload of a tensor that holds NaN or an infinity; returns its size."""
        out[: HEADER.size] = np.frombuffer(HEADER.pack(NOT_FINITE, 0, 0), np.uint8)
        return HEADER.size

    def write(self, x: np.ndarray, positions: np.ndarray, out: np.ndarray) -> int:
        """Write the payload of the values at ascending positions; returns its size."""
        form, low_bits = smallest_form(x.size, len(positions))
        parts = [
            np.frombuffer(HEADER.pack(form, low_bits, len(positions)), np.uint8),
            self._pack_values(x[positions]),
            pack_positions(positions, x.size, form, low_bits),
        ]
        packed = np.concatenate(parts)
        out[: len(packed)] = packed
        return len(packed)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        yield from ()
        form, low_bits, count = self.check_header(payload, length, len(payload))
        if form == NOT_FINITE:
            return combine_nan
        end = HEADER.size + count * self.value_bytes
        values = self.unpack_values(payload[HEADER.size : end])
        return functools.partial(combine_at, unpack_positions(payload[end:], length, count, form, low_bits), values)

    def check_header(self, payload: np.ndarray, length: int, size: int) -> tuple[int, int, int]:
        """Form, bits of a low part and number of values of a payload of ``size`` bytes.

        Raises:
            PayloadError: the payload is cut short, too long or not one of ``length`` elements.
        """
        if size < HEADER.size:
            raise PayloadError(f"A topk payload has at least {HEADER.size} bytes, but {size} came.")
        form, low_bits, count = HEADER.unpack(payload[: HEADER.size].tobytes())
        if form > NOT_FINITE or low_bits > 32 or count > length:
            raise PayloadError(
                f"Not a topk payload of {length} elements: form {form}, {low_bits} low bits, {count} values. "
                f"Decode with the shape it was encoded with."
            )
        expected = HEADER.size
        if form != NOT_FINITE:
            expected += count * self.value_bytes + form_size(length, count, form, low_bits)
        if size != expected:
            raise PayloadError(
                f"A topk payload of {count} of {length} values has {expected} bytes, but {size} came. "
                f"Decode with the configuration and the shape it was encoded with: {self.config()}"
            )
        return form, low_bits, count

    def _pack_values(self, values: np.ndarray) -> np.ndarray:
        if self.values == "float16":
            values = np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype("<f2")
        return np.ascontiguousarray(values).view(np.uint8)

    def unpack_values(self, data: np.ndarray) -> np.ndarray:
        """float32 values from the bytes that follow the header."""
        return np.frombuffer(data.tobytes(), "<f4" if self.values == "float32" else "<f2").astype(np.float32)


def combine_nan(out: np.ndarray, mode: str) -> None:
    """What the payload of a tensor that was not finite decodes to."""
    combine(out, np.full(out.size, np.nan, np.float32), mode)


def combine_at(positions: np.ndarray, values: np.ndarray, out: np.ndarray, mode: str) -> None:
    """Set, add or subtract values at some positions and zero elsewhere."""
    if mode == "set":
        out[...] = 0
        mode = "add"
    kept = out[positions]
    combine(kept, values, mode)
    out[positions] = kept


def largest_positions(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` largest, ascending; of equal ones those that stand first."""
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def form_size(length: int, count: int, form: int, low_bits: int) -> int:
    """Bytes of ``count`` positions below ``length`` in one form."""
    if count == 0:
        return 0
    if form == PLAIN:
        return -(-count * low_bits // 8)
    if form == BITMAP:
        return -(-length // 8)
    return -(-count * low_bits // 8) + -(-(((length - 1) >> low_bits) + count) // 8)


def position_sizes(length: int, count: int) -> tuple[tuple[int, int, int], int]:
    """Bytes of the plain, bitmap and gap form, and the low bits that make the gap form smallest.

    Plain: each position in ``bit_length(length - 1)`` bits. Bitmap: one bit an element. Gaps:
    the low ``r`` bits of each position verbatim, and of the rest ``h`` the gaps in unary: bit
    ``h_i + i`` of a bit map is set. About ``2 + log2(length / count)`` bits a position.
    """
    width = max(length - 1, 0).bit_length()
    gap, low_bits = min((form_size(length, count, GAPS, bits), bits) for bits in range(width + 1))
    return (form_size(length, count, PLAIN, width), form_size(length, count, BITMAP, 0), gap), low_bits


@functools.lru_cache(maxsize=4096)
def smallest_form(length: int, count: int) -> tuple[int, int]:
    """The form that takes the fewest bytes (the first of equals) and the low bits in its header."""
    sizes, low_bits = position_sizes(length, count)
    form = sizes.index(min(sizes))
    return form, (max(length - 1, 0).bit_length(), 0, low_bits)[form]


def pack_positions(positions: np.ndarray, length: int, form: int, low_bits: int) -> np.ndarray:
    """Pack ascending positions in the given form; the inverse is :func:`unpack_positions`."""
    count = len(positions)
    if count == 0:
        return np.empty(0, np.uint8)
    if form == PLAIN:
        return pack_stream(positions, low_bits)
    marks = np.zeros(length if form == BITMAP else ((length - 1) >> low_bits) + count, np.uint8)
    if form == BITMAP:
        marks[positions] = 1
        return np.packbits(marks, bitorder="little")
    marks[(positions >> low_bits) + np.arange(count)] = 1
    low = pack_stream(positions & ((1 << low_bits) - 1), low_bits)
    return np.concatenate([low, np.packbits(marks, bitorder="little")])


def unpack_positions(data: np.ndarray, length: int, count: int, form: int, low_bits: int) -> np.ndarray:
    """Ascending positions, int64 of shape (count,).

    Raises:
        PayloadError: they are not ``count`` ascending positions below ``length``.
    """
    if form == PLAIN or count == 0:
        positions = unpack_stream(data, count, low_bits).astype(np.int64)
    else:
        low_bytes = -(-count * low_bits // 8)
        marked = np.flatnonzero(np.unpackbits(data[low_bytes:], bitorder="little"))
        if len(marked) != count:
            raise PayloadError(f"A topk payload announces {count} values, but marks {len(marked)} positions.")
        positions = marked.astype(np.int64)
        if form == GAPS:
            low = unpack_stream(data[:low_bytes], count, low_bits).astype(np.int64)
            positions = ((positions - np.arange(count)) << low_bits) | low
    if count and (positions[-1] >= length or (np.diff(positions) <= 0).any()):
        raise PayloadError(f"A topk payload of {length} elements holds positions that are not ascending or too large.")
    return positions
