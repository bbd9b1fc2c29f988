"""EliasQSGD on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.elias`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.elias import FIXED_WIDTH, EliasQSGD, damaged
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.numba.compiling import jit
from hvd_qsgd.kernels.numba.reduce import all_finite
from hvd_qsgd.kernels.numba.topk import pack_bits_at


@jit
def reversed_omega(value):  # type: ignore[no-untyped-def]
    """Elias omega code with its first bit lowest, and its length."""
    code, length = np.int64(0), np.int64(1)
    while value > 1:
        width = np.int64(0)
        rest = value
        group = np.int64(0)
        while rest:
            group = (group << 1) | (rest & 1)
            rest >>= 1
            width += 1
        # ``group`` has its highest bit lowest now; what came before stands behind it.
        code = (code << width) | group
        length += width
        value = width - 1
    return code, length


@jit
def pack(levels, out):  # type: ignore[no-untyped-def]
    """Write the codes into zeroed bytes; returns bits and number of levels, or (-1, 0) if they do not fit."""
    at, count, last = np.int64(0), 0, np.int64(-1)
    room = 8 * len(out)
    for i in range(len(levels)):
        level = np.int64(levels[i])
        if level == 0:
            continue
        distance, length = reversed_omega(np.int64(i) - last)
        size, size_length = reversed_omega(abs(level))
        if at + length + size_length + 1 > room:
            return np.int64(-1), 0
        pack_bits_at(out, at, distance, length)
        at += length
        pack_bits_at(out, at, np.int64(level < 0), 1)
        pack_bits_at(out, at + 1, size, size_length)
        at += 1 + size_length
        last = np.int64(i)
        count += 1
    return at, count


@jit
def take_omega(data, at):  # type: ignore[no-untyped-def]
    """A number and where the next code starts; (0, at) if the bits end or are no code."""
    value = np.int64(1)
    end = 8 * len(data)
    while True:
        if at >= end:
            return np.int64(0), at
        bit = (data[at >> 3] >> (at & 7)) & 1
        at += 1
        if not bit:
            return value, at
        if value > 31 or at + value > end:
            return np.int64(0), at
        group = np.int64(1)
        for _ in range(value):
            group = (group << 1) | ((data[at >> 3] >> (at & 7)) & 1)
            at += 1
        value = group


@jit
def unpack(data, count, levels, largest):  # type: ignore[no-untyped-def]
    """Fill zeroed ``levels``; False if the bytes are not the codes of so many."""
    at, position = np.int64(0), np.int64(-1)
    for _ in range(count):
        distance, at = take_omega(data, at)
        if distance == 0 or at >= 8 * len(data):
            return False
        negative = (data[at >> 3] >> (at & 7)) & 1
        level, at = take_omega(data, at + 1)
        position += distance
        if level == 0 or level > largest or position >= len(levels):
            return False
        levels[position] = -level if negative else level
    if 8 * len(data) - at >= 8:
        return False
    return at == 8 * len(data) or data[at >> 3] >> (at & 7) == 0


@dataclass(frozen=True)
class EliasKernels(Kernels):
    """Numba implementation of an EliasQSGD codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: EliasQSGD

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        fixed = np.empty(codec.quantizer.payload_size(x.size), np.uint8)
        kernels_for(codec.quantizer, "numba").encode_into(x, fixed, key, first)
        at = 4 * codec.quantizer.buckets(x.size)
        packed = np.zeros(len(fixed) - at, np.uint8)
        bits, count = pack(codec.levels_of(fixed, x.size), packed)
        # Codes that do not fit are not shorter than those of fixed width.
        return codec.write(out, fixed, at, packed if bits < 0 else packed[: (bits + 7) // 8], count)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        codec = self.codec
        at, count = codec.check_header(payload, length)
        if count == FIXED_WIDTH:
            return (yield from codec.prepare_decode(payload, length))
        levels = np.zeros(length, np.int8)
        if not unpack(payload[at:], count, levels, codec.quantizer.levels):
            raise damaged(length, count)
        return functools.partial(codec.add_levels, levels, payload[: at - 4])

    def all_finite(self, x: np.ndarray) -> bool:
        return all_finite(x)
