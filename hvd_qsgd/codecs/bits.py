"""Packing of small integers into bytes, in NumPy."""

from __future__ import annotations

import functools

import numpy as np


def plane_widths(bits: int) -> tuple[int, ...]:
    """The powers of two that add up to ``bits``, widest first: 7 -> (4, 2, 1).

    A code of 3, 5, 6 or 7 bits is stored as planes of these widths, so that no code
    crosses a byte and every plane can be packed with vector instructions.
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@functools.lru_cache(maxsize=4096)
def planes_size(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits take as planes."""
    return sum(-(-length * width // 8) for width in plane_widths(bits))


def pack_planes(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Pack rows of codes, each row on its own.

    Byte ``j`` of a plane of width ``w`` holds the codes ``j``, ``j + t``, ``j + 2t``, ...
    of the row from the low bits upwards, with ``t = ceil(length * w / 8)``: neighbours
    stay neighbours, which is what a vector unit wants. Missing codes are zero bits.

    Args:
        codes: uint8, shape (rows, length).
        out: uint8, shape (rows, planes_size(length, bits)); overwritten.
    """
    length = codes.shape[1]
    column = shift = 0
    for width in plane_widths(bits):
        stride = -(-length * width // 8)
        plane = out[:, column : column + stride]
        plane[:] = 0
        for slot in range(8 // width):
            part = (codes[:, slot * stride : (slot + 1) * stride] >> shift) & ((1 << width) - 1)
            plane[:, : part.shape[1]] |= (part << (slot * width)).astype(np.uint8)
        column += stride
        shift += width


def unpack_planes(packed: np.ndarray, length: int, bits: int) -> np.ndarray:
    """The inverse of :func:`pack_planes`: uint8 codes of shape (rows, length)."""
    codes = np.zeros((packed.shape[0], length), np.uint8)
    column = shift = 0
    for width in plane_widths(bits):
        stride = -(-length * width // 8)
        plane = packed[:, column : column + stride]
        for slot in range(8 // width):
            part = codes[:, slot * stride : (slot + 1) * stride]
            code_bits = (plane[:, : part.shape[1]] >> np.uint8(slot * width)) & np.uint8((1 << width) - 1)
            part |= code_bits << np.uint8(shift)
        column += stride
        shift += width
    return codes


def pack_stream(values: np.ndarray, width: int) -> np.ndarray:
    """Pack integers of ``width`` bits (0..32) into one little-endian bit stream.

    Returns:
        uint8, shape (ceil(len(values) * width / 8),); unused high bits are zero.
    """
    as_bytes = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :width], bitorder="little")


def unpack_stream(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """The inverse of :func:`pack_stream`: uint32 values of shape (count,)."""
    bits = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
    padded = np.zeros((count, 32), np.uint8)
    padded[:, :width] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").reshape(count).astype(np.uint32)
