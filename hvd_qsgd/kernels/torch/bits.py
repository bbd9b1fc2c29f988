"""Packing of small integers in torch operations; see :mod:`hvd_qsgd.codecs.bits`."""

from __future__ import annotations

import torch

from hvd_qsgd.codecs.bits import plane_widths, planes_size


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of shape (rows, length) to uint8 of shape (rows, planes_size)."""
    rows, length = codes.shape
    out = codes.new_zeros((rows, planes_size(length, bits)))
    column = shift = 0
    for width in plane_widths(bits):
        stride = -(-length * width // 8)
        plane = out[:, column : column + stride]
        for slot in range(8 // width):
            part = (codes[:, slot * stride : (slot + 1) * stride] >> shift) & ((1 << width) - 1)
            plane[:, : part.shape[1]] |= part << (slot * width)
        column += stride
        shift += width
    return out


def unpack_planes(packed: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_planes`."""
    codes = packed.new_zeros((packed.shape[0], length))
    column = shift = 0
    for width in plane_widths(bits):
        stride = -(-length * width // 8)
        plane = packed[:, column : column + stride]
        for slot in range(8 // width):
            part = codes[:, slot * stride : (slot + 1) * stride]
            part |= ((plane[:, : part.shape[1]] >> (slot * width)) & ((1 << width) - 1)) << shift
        column += stride
        shift += width
    return codes


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """0/1 values, flat uint8, to bytes with the first bit lowest."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded << places).sum(dim=1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: uint8 of 8 times the length."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).reshape(-1)


def pack_stream(values: torch.Tensor, width: int) -> torch.Tensor:
    """int64 values of ``width`` bits to one little-endian bit stream."""
    shifts = torch.arange(width, dtype=torch.int64, device=values.device)
    return pack_bits(((values[:, None] >> shifts) & 1).to(torch.uint8).reshape(-1))


def unpack_stream(packed: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """The inverse of :func:`pack_stream`: int64 of shape (count,)."""
    bits = unpack_bits(packed)[: count * width].reshape(count, width).to(torch.int64)
    shifts = torch.arange(width, dtype=torch.int64, device=packed.device)
    return (bits << shifts).sum(dim=1)
