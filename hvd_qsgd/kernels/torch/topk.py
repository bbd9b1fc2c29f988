"""TopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.readback import Looks
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
from hvd_qsgd.kernels.torch.readback import Apply, LookingKernels, Write
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
        return pack_bits(marks.index_fill_(0, positions, 1))
    marks.index_fill_(0, (positions >> low_bits) + torch.arange(count, device=positions.device), 1)
    return torch.cat([pack_stream(positions & ((1 << low_bits) - 1), low_bits), pack_bits(marks)])


def unpack_positions(data: torch.Tensor, length: int, count: int, form: int, low_bits: int) -> Looks[torch.Tensor]:
    """:func:`hvd_qsgd.codecs.topk.unpack_positions`."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=data.device)
    if form == PLAIN:
        positions = unpack_stream(data, count, low_bits)
        marked = positions.new_full((), count)
    else:
        low_bytes = -(-count * low_bits // 8)
        marks = unpack_bits(data[low_bytes:])
        positions, marked = marked_positions(marks, count), marks.sum()
        if form != BITMAP:
            high = positions - torch.arange(count, device=data.device)
            positions = (high << low_bits) | unpack_stream(data[:low_bytes], count, low_bits)
    good = (positions[-1] < length) & (positions.diff() > 0).all()
    (seen,) = yield [torch.stack([marked, good.to(torch.int64)])]
    if seen[0] != count:
        raise PayloadError(f"A topk payload announces {count} values, but marks {seen[0]} positions.")
    if not seen[1]:
        raise PayloadError(f"A topk payload of {length} elements holds positions that are not ascending or too large.")
    return positions


def marked_positions(marks: torch.Tensor, count: int) -> torch.Tensor:
    """Where the first ``count`` of some marks stand, ascending; ``len(marks)`` for each that is missing.

    Unlike ``nonzero()``, which has to tell the host their number.
    """
    return torch.searchsorted(marks.cumsum(0), torch.arange(1, count + 1, device=marks.device))


def magnitudes_of(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns without the sign, int32: their order is that of the magnitudes."""
    return x.view(torch.int32) & 0x7FFFFFFF


def largest_positions(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.topk.largest_positions`."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=magnitudes.device)
    threshold = magnitudes.topk(count, sorted=False).values.min()
    above, equal = magnitudes > threshold, magnitudes == threshold
    return marked_positions(above | (equal & (equal.cumsum(0) <= count - above.sum())), count)


@dataclass(frozen=True)
class TopKKernels(LookingKernels):
    """torch implementation of a TopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: TopK

    def prepare_encode(self, x: torch.Tensor, key: int = 0, first: int = 0, keep_error: bool = False) -> Looks[Write]:
        positions = yield from self.choose(x)
        return functools.partial(self._write, x, positions, keep_error)

    def choose(self, x: torch.Tensor) -> Looks[torch.Tensor | None]:
        """Ascending positions of what is sent of ``x``; None if a value is not finite."""
        if not len(x):
            return torch.empty(0, dtype=torch.int64, device=x.device)
        magnitudes = magnitudes_of(x)
        (seen,) = yield [torch.stack([magnitudes.max().to(torch.int64), magnitudes.count_nonzero()])]
        if seen[0] >= INFINITY_BITS:
            return None
        return self.largest_positions(magnitudes, min(self.codec.kept(len(x)), int(seen[1])))

    def largest_positions(self, magnitudes: torch.Tensor, count: int) -> torch.Tensor:
        return largest_positions(magnitudes, count)

    def _write(self, x: torch.Tensor, positions: torch.Tensor | None, keep_error: bool, out: torch.Tensor) -> int:
        """:meth:`hvd_qsgd.codecs.topk.TopK.write`, or its ``write_not_finite``."""
        if positions is None:
            packed = to_device(HEADER.pack(NOT_FINITE, 0, 0), x.device)
        else:
            form, low_bits = smallest_form(len(x), len(positions))
            values = self._rounded(x[positions])
            header = to_device(HEADER.pack(form, low_bits, len(positions)), x.device)
            packed = torch.cat(
                [header, reinterpret(values, torch.uint8), pack_positions(positions, len(x), form, low_bits)]
            )
        out[: len(packed)] = packed
        if keep_error and positions is None:
            x.fill_(float("nan"))
        elif keep_error:
            x[positions] = x[positions] - values
        return len(packed)

    def prepare_decode(self, payload: torch.Tensor, length: int) -> Looks[Apply]:
        codec = self.codec
        (header,) = yield [payload[: HEADER.size]]
        form, low_bits, count = codec.check_header(header, length, size=len(payload))
        if form == NOT_FINITE:
            return add_nan
        end = HEADER.size + count * codec.value_bytes
        positions = yield from unpack_positions(payload[end:], length, count, form, low_bits)
        values = reinterpret(payload[HEADER.size : end], self._dtype).to(torch.float32)
        return functools.partial(add_values, positions, values)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.codec.values == "float32" else torch.float16

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        if self.codec.values == "float16":
            values = values.clamp(-float(LARGEST_HALF), float(LARGEST_HALF)).to(torch.float16)
        return values


def add_nan(out: torch.Tensor, mode: str) -> None:
    """What the payload of a tensor that was not finite decodes to."""
    apply(out, torch.full_like(out, float("nan")), mode)


def add_values(positions: torch.Tensor, values: torch.Tensor, out: torch.Tensor, mode: str) -> None:
    """Set, add or subtract values at some positions and zero elsewhere."""
    if mode == "set":
        out.zero_()
        mode = "add"
    kept = out[positions]
    apply(kept, values, mode)
    out[positions] = kept
