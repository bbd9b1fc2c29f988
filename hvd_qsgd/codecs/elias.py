"""EliasQSGD: QSGD with entropy coding, as in the paper.

Source: Alistarh et al., QSGD (arXiv 1610.02132), section 3.1 and Theorem 3.2: of each level
that is not zero the distance to the one before in Elias omega code, the sign, and the level
in Elias omega code. Elias, Universal codeword sets, IEEE Trans. Inf. Theory 1975.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, combine
from hvd_qsgd.codecs.bits import planes_size, unpack_planes
from hvd_qsgd.codecs.qsgd import QSGD, dequantize
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.errors import PayloadError

#: In place of the number of levels that are not zero: QSGD's fixed-width codes follow.
FIXED_WIDTH = 0xFFFFFFFF


@dataclass(frozen=True)
class EliasQSGD(Codec):
    """The levels of :class:`hvd_qsgd.QSGD` in fewer bytes: short codes for small levels and runs of zeros.

    Args:
        bits, bucket_size, norm, rounding: see :class:`hvd_qsgd.QSGD`. The L2 norm makes most
            levels zero, which this code is for, at the price of more noise.

    Decoded values are those of QSGD with the same settings and key. Where the code would not be
    shorter, QSGD's own codes are sent, so that a payload has at most four bytes more than QSGD's.
    With L2 norm, s levels and one bucket of n values the expected number of bits is at most
    ``(3 + 3/2 log2(2 (s^2 + n) / (s (s + sqrt n)))) s (s + sqrt n) + 32`` up to lower-order terms
    (Theorem 3.2), and 32 for the count.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: int = 4
    bucket_size: int = 512
    norm: str = "l2"
    rounding: str = "stochastic"

    name: ClassVar[str] = "qsgd_elias"
    variable_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("bits", "bucket_size"):
            object.__setattr__(self, field, getattr(self.quantizer, field))

    @cached_property
    def quantizer(self) -> QSGD:
        """Whose levels are sent."""
        return QSGD(self.bits, self.bucket_size, self.norm, self.rounding)

    @property
    def granularity(self) -> int:
        return self.bucket_size

    @property
    def biased(self) -> bool:
        return self.quantizer.biased

    @property
    def omega(self) -> float:
        return self.quantizer.omega

    @property
    def one_level(self) -> bool:
        return self.quantizer.one_level

    def payload_size(self, length: int) -> int:
        return 4 + self.quantizer.payload_size(length)

    # -- payload: scales, number of levels that are not zero, their codes --------------------------

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        fixed = np.empty(self.quantizer.payload_size(x.size), np.uint8)
        self.quantizer.encode_into(x, fixed, key, first)
        packed, count = pack_levels(self.levels_of(fixed, x.size))
        return self.write(out, fixed, 4 * self.quantizer.buckets(x.size), packed, count)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        yield from ()
        at, count = self.check_header(payload, length)
        if count == FIXED_WIDTH:
            return functools.partial(self.quantizer.decode_into, np.concatenate([payload[: at - 4], payload[at:]]))
        levels = unpack_levels(payload[at:], count, length, self.quantizer.levels)
        return functools.partial(self.add_levels, levels, payload[: at - 4])

    def write(self, out: np.ndarray, fixed: np.ndarray, at: int, packed: np.ndarray, count: int) -> int:
        """Put the shorter of both codes after the scales and the count; returns the size of the payload."""
        codes = fixed[at:]
        if len(packed) >= len(codes):
            packed, count = codes, FIXED_WIDTH
        size = at + 4 + len(packed)
        self.check_room(out, size)
        out[:at] = fixed[:at]
        out[at : at + 4] = np.array([count], "<u4").view(np.uint8)
        out[at + 4 : size] = packed
        return size

    def check_header(self, payload: np.ndarray, length: int) -> tuple[int, int]:
        """Where the codes start, and the number of levels that are not zero."""
        at = 4 * self.quantizer.buckets(length)
        if len(payload) < at + 4:
            raise PayloadError(
                f"A qsgd_elias payload of {length} elements has at least {at + 4} bytes, but {len(payload)} came."
            )
        count = int(np.frombuffer(payload[at : at + 4].tobytes(), "<u4")[0])
        if count == FIXED_WIDTH:
            if len(payload) != self.payload_size(length):
                raise PayloadError(
                    f"A qsgd_elias payload of {length} elements in fixed width has {self.payload_size(length)} bytes, "
                    f"but {len(payload)} came."
                )
        elif count > length:
            raise PayloadError(f"A qsgd_elias payload of {length} elements announces {count} levels.")
        return at + 4, count

    def levels_of(self, fixed: np.ndarray, length: int) -> np.ndarray:
        """The levels in a payload of QSGD, int32."""
        at, parts = 4 * self.quantizer.buckets(length), []
        for rows, size in ((length // self.bucket_size, self.bucket_size), (1, length % self.bucket_size)):
            stride = planes_size(size, self.bits)
            packed = fixed[at : at + rows * stride].reshape(rows, stride)
            parts.append(unpack_planes(packed, size, self.bits).reshape(-1))
            at += rows * stride
        return np.concatenate(parts).astype(np.int32) - self.quantizer.levels

    def add_levels(self, levels: np.ndarray, scales: np.ndarray, out: np.ndarray, mode: str) -> None:
        """Decode levels on scales that stand as bytes in a payload."""
        of_elements = np.repeat(np.frombuffer(scales.tobytes(), "<f4"), self.bucket_size)[: len(levels)]
        combine(out, dequantize(levels[:, None], of_elements, self.quantizer.levels)[:, 0], mode)


def omega_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elias omega codes of whole numbers from 1 to 2^32 - 1: the code as a number, first bit highest, and its length.

    A code is the number in binary, preceded by its length less one in binary, and so on down to 1,
    and followed by a zero bit.
    """
    rest = values.astype(np.uint64)
    codes, lengths = np.zeros_like(rest), np.ones(len(rest), np.uint64)
    while (active := rest > 1).any():
        width = np.floor(np.log2(np.maximum(rest, 1).astype(np.float64))).astype(np.uint64) + np.uint64(1)
        codes = np.where(active, codes | (rest << lengths), codes)
        lengths = np.where(active, lengths + width, lengths)
        rest = np.where(active, width - np.uint64(1), rest)
    return codes, lengths


def pack_levels(levels: np.ndarray) -> tuple[np.ndarray, int]:
    """The code of levels, a bit stream from bit 0 up, and how many are not zero.

    Of each of these: the distance to the one before (from position -1), 1 for minus, the magnitude.
    """
    positions = np.flatnonzero(levels)
    distances, distance_lengths = omega_codes(np.diff(positions, prepend=-1))
    sizes, size_lengths = omega_codes(np.abs(levels[positions]))
    signs = (levels[positions] < 0).astype(np.uint64)
    codes = (((distances << np.uint64(1)) | signs) << size_lengths) | sizes
    lengths = (distance_lengths + size_lengths + np.uint64(1)).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    shifts = (np.repeat(lengths, lengths) - 1 - slots).astype(np.uint64)
    bits = (np.repeat(codes, lengths) >> shifts) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8), bitorder="little"), len(positions)


def unpack_levels(packed: np.ndarray, count: int, length: int, largest: int) -> np.ndarray:
    """The inverse of :func:`pack_levels`: int8 of shape (length,), which the levels of 8 bits fit into.

    Raises:
        PayloadError: the bits are no code of ``count`` levels up to ``largest`` at positions below ``length``.
    """
    bits: Any = np.unpackbits(packed, bitorder="little").tolist()
    levels = np.zeros(length, np.int8)
    at, position = 0, -1

    def take(width: int) -> int:
        nonlocal at
        if at + width > len(bits):
            raise damaged(length, count)
        value = 0
        for bit in bits[at : at + width]:
            value = 2 * value + bit
        at += width
        return value

    def omega() -> int:
        value = 1
        while take(1):
            if value > 31:
                raise damaged(length, count)
            value = (1 << value) | take(value)
        return value

    for _ in range(count):
        position += omega()
        negative, level = take(1), omega()
        if position >= length or level > largest:
            raise damaged(length, count)
        levels[position] = -level if negative else level
    if len(bits) - at >= 8 or any(bits[at:]):
        raise damaged(length, count)
    return levels


def damaged(length: int, count: int) -> PayloadError:
    return PayloadError(
        f"A qsgd_elias payload of {length} elements does not hold the codes of {count} levels in just its bytes, but "
        f"others came. Decode with the configuration and the shape it was encoded with."
    )
