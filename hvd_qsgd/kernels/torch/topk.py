"""TopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.topk import (
    BITMAP,
    HEADER,
    INFINITY_BITS,
    LARGEST_HALF,
    NOT_FINITE,
    PLAIN,
    TopK,
    smallest_form,
)
from hvd_qsgd.errors import PayloadError
from hvd_qsgd.kernels.torch.bits import pack_bits, pack_stream, unpack_bits, unpack_stream
from hvd_qsgd.kernels.torch.plain import apply, reinterpret
from hvd_qsgd.kernels.torch.transfer import to_device


def pack_positions(positions: torch.Tensor, length: int, form: int, low_bits: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.topk.pack_positions`."""
    count = len(positions)
    if count == 0:
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    if form == PLAIN:
        return pack_stream(positions, low_bits)
    size = length if form == BITMAP else ((length - 1) >> low_bits) + count
    marks = torch.zeros(size, dtype=torch.uint8, device=positions.device)
    if form == BITMAP:
        marks[positions] = 1
        return pack_bits(marks)
    marks[(positions >> low_bits) + torch.arange(count, device=positions.device)] = 1
    return torch.cat([pack_stream(positions & ((1 << low_bits) - 1), low_bits), pack_bits(marks)])


def unpack_positions(data: torch.Tensor, length: int, count: int, form: int, low_bits: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.topk.unpack_positions`."""
    if form == PLAIN or count == 0:
        positions = unpack_stream(data, count, low_bits)
    else:
        low_bytes = -(-count * low_bits // 8)
        positions = unpack_bits(data[low_bytes:]).nonzero().view(-1)
        if len(positions) != count:
            raise PayloadError(f"A topk payload announces {count} values, but marks {len(positions)} positions.")
        if form != BITMAP:
            high = positions - torch.arange(count, device=data.device)
            positions = (high << low_bits) | unpack_stream(data[:low_bytes], count, low_bits)
    if count and (bool(positions[-1] >= length) or bool((positions.diff() <= 0).any())):
        raise PayloadError(f"A topk payload of {length} elements holds positions that are not ascending or too large.")
    return positions


def magnitudes_of(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns without the sign, int32: their order is that of the magnitudes."""
    return x.view(torch.int32) & 0x7FFFFFFF


def largest_positions(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.topk.largest_positions`."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=magnitudes.device)
    threshold = magnitudes.topk(count, sorted=False).values.min()
    above = (magnitudes > threshold).nonzero().view(-1)
    equal = (magnitudes == threshold).nonzero().view(-1)[: count - len(above)]
    return torch.cat([above, equal]).sort().values


@dataclass(frozen=True)
class TopKKernels(Kernels):
    """torch implementation of a TopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: TopK

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        magnitudes = magnitudes_of(x)
        if len(x) and int(magnitudes.max()) >= INFINITY_BITS:
            return self.write_not_finite(out)
        count = min(self.codec.kept(len(x)), int(magnitudes.count_nonzero()))
        return self.write(x, self.largest_positions(magnitudes, count), out)

    def write_not_finite(self, out: torch.Tensor) -> int:
        """:meth:`hvd_qsgd.codecs.topk.TopK.write_not_finite`."""
        out[: HEADER.size] = self._header(NOT_FINITE, 0, 0, out.device)
        return HEADER.size

    def write(self, x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> int:
        """:meth:`hvd_qsgd.codecs.topk.TopK.write`."""
        form, low_bits = smallest_form(len(x), len(positions))
        parts = [
            self._header(form, low_bits, len(positions), x.device),
            self._pack_values(x[positions]),
            pack_positions(positions, len(x), form, low_bits),
        ]
        packed = torch.cat(parts)
        out[: len(packed)] = packed
        return len(packed)

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        codec = self.codec
        header = payload[: HEADER.size].cpu().numpy()
        form, low_bits, count = codec.check_header(header, len(out), size=len(payload))
        if form == NOT_FINITE:
            apply(out, torch.full_like(out, float("nan")), mode)
            return
        end = HEADER.size + count * codec.value_bytes
        dtype = torch.float32 if codec.values == "float32" else torch.float16
        values = reinterpret(payload[HEADER.size : end], dtype).to(torch.float32)
        positions = unpack_positions(payload[end:], len(out), count, form, low_bits)
        if mode == "set":
            out.zero_()
            mode = "add"
        kept = out[positions]
        apply(kept, values, mode)
        out[positions] = kept

    def largest_positions(self, magnitudes: torch.Tensor, count: int) -> torch.Tensor:
        return largest_positions(magnitudes, count)

    def _header(self, form: int, low_bits: int, count: int, device: torch.device) -> torch.Tensor:
        return to_device(HEADER.pack(form, low_bits, count), device)

    def _pack_values(self, values: torch.Tensor) -> torch.Tensor:
        if self.codec.values == "float16":
            values = values.clamp(-float(LARGEST_HALF), float(LARGEST_HALF)).to(torch.float16)
        return reinterpret(values, torch.uint8)
