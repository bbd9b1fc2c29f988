"""QSGD in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.bits import planes_size
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.codecs.random_words import MULTIPLIER_1, MULTIPLIER_2
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.kernels.torch.bits import pack_planes, unpack_planes
from hvd_qsgd.kernels.torch.plain import apply, reinterpret

#: Elements that are worked on at a time: temporary memory stays small, and on a CPU in the cache.
CHUNK = 1 << 20


def signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def shift_right(values: torch.Tensor, places: int) -> torch.Tensor:
    """int32 shifted right with zeros coming in."""
    return (values >> places).bitwise_and_((1 << (32 - places)) - 1)


def words(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.random_words.words` as int32 with the same bits: products and sums wrap around."""
    h = torch.arange(count, dtype=torch.int32, device=device)
    h += signed(first + key)
    h ^= shift_right(h, 16)
    h *= signed(MULTIPLIER_1)
    h ^= shift_right(h, 15)
    h += signed(key >> 32)
    h *= signed(MULTIPLIER_2)
    h ^= shift_right(h, 15)
    return h


def l2_norms(rows: torch.Tensor) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.l2_norms`."""
    return row_sums(rows.to(torch.float64).square()).sqrt().to(torch.float32)


def row_sums(rows: torch.Tensor) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.row_sums`: the same sums in the same order."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % NORM_LANES))
    sums = rows.new_zeros((rows.shape[0], NORM_LANES))
    for start in range(0, padded.shape[1], NORM_LANES):
        sums += padded[:, start : start + NORM_LANES]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


@dataclass(frozen=True)
class QSGDKernels(Kernels):
    """torch implementation of a QSGD codec; see :class:`hvd_qsgd.codecs.base.Kernels`.

    No function waits for the device.
    """

    codec: QSGD

    halves = True

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        all_scales = self.scales(x)
        at = 4 * len(all_scales)
        out[:at] = all_scales.view(torch.uint8)
        for rows, scales, bucket in self._rows(x, all_scales, first):
            codes = self._levels(rows, scales, key, bucket) + self.codec.levels
            packed = pack_planes(codes.to(torch.uint8), self.codec.bits).reshape(-1)
            out[at : at + len(packed)] = packed
            at += len(packed)
        return at

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        codec = self.codec
        codec.check_payload(payload, out.numel())
        at = 4 * codec.buckets(out.numel())
        all_scales = reinterpret(payload[:at], torch.float32)
        for rows, scales, _ in self._rows(out, all_scales, 0):
            stride = planes_size(rows.shape[1], codec.bits)
            packed = payload[at : at + len(rows) * stride].reshape(len(rows), stride)
            levels = unpack_planes(packed, rows.shape[1], codec.bits).to(torch.int32) - codec.levels
            apply(rows, dequantize(levels, scales, codec.levels), mode)
            at += packed.numel()

    def prepare_average(
        self, message: torch.Tensor, spans: Sequence[tuple[int, int]], length: int
    ) -> Looks[Callable[[torch.Tensor], None]]:
        average = yield from super().prepare_average(message, spans, length)

        def rounded_once(out: torch.Tensor) -> None:
            # A sum in half precision would be rounded at each step.
            mean = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            average(mean)
            if mean is not out:
                out.copy_(mean)

        return rounded_once

    def agree_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.scales(x).view(torch.int32))

    def to_lanes(
        self, x: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, key: int = 0, first: int = 0
    ) -> None:
        width = self.codec.lane_width(ranks)
        lanes = 32 // width
        at = 0
        for rows, scales, bucket in self._rows(x, agreed.view(torch.float32), first):
            stride = -(-rows.shape[1] // lanes)
            levels = self._levels(rows, scales, key, bucket)
            words = out[at : at + len(rows) * stride].view(len(rows), stride).zero_()
            for lane in range(lanes):
                part = levels[:, lane * stride : (lane + 1) * stride]
                words[:, : part.shape[1]] += part << (lane * width)
            at += words.numel()

    def from_lanes(self, sums: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, count: int) -> None:
        largest = self.codec.levels * ranks
        width = self.codec.lane_width(ranks)
        lanes = 32 // width
        mask = (1 << width) - 1
        offset = sum(largest << (width * lane) for lane in range(lanes))
        at = 0
        for rows, scales, _ in self._rows(out, agreed.view(torch.float32), 0):
            stride = -(-rows.shape[1] // lanes)
            words = sums[at : at + len(rows) * stride].view(len(rows), stride).to(torch.int64) + offset
            for lane in range(lanes):
                part = rows[:, lane * stride : (lane + 1) * stride]
                levels = ((words[:, : part.shape[1]] >> (lane * width)) & mask) - largest
                part.copy_(dequantize(levels, scales, self.codec.levels * count))
            at += words.numel()

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`hvd_qsgd.codecs.qsgd.QSGD.scales`."""
        scales = torch.empty(self.codec.buckets(x.numel()), dtype=torch.float32, device=x.device)
        for rows, part, _ in self._rows(x, scales, 0):
            values = rows.to(torch.float32)
            largest = (values.view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
            part.copy_(largest.view(torch.float32) if self.codec.norm == "max" else l2_norms(values))
            part.masked_fill_((largest >= INFINITY_BITS) | part.isinf(), float("nan"))
        return scales

    def _rows(
        self, x: torch.Tensor, scales: torch.Tensor, first: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        size = self.codec.bucket_size
        full = x.numel() // size
        bucket = first // size
        step = max(CHUNK // size, 1)
        for start in range(0, full, step):
            stop = min(start + step, full)
            yield x[start * size : stop * size].view(stop - start, size), scales[start:stop], bucket + start
        if full * size < x.numel():
            yield x[full * size :].view(1, -1), scales[full:], bucket + full

    def _levels(self, rows: torch.Tensor, scales: torch.Tensor, key: int, bucket: int) -> torch.Tensor:
        s = self.codec.levels
        unusable = ~((scales > 0) & (scales < float("inf")))
        # No torch.where() with numbers: torch would bring them to the device, and wait.
        lift = torch.ones_like(scales).masked_fill_(scales < float(TINY), float(1 / TINY))
        safe = (scales * lift).masked_fill_(unusable, 1.0)
        factor = torch.full_like(safe, s << FRACTION_BITS) / safe
        # Multiplied by two factors one after the other, like the specification; NaN and infinity become level 0.
        values = rows.to(torch.float32).masked_fill(unusable[:, None], 0.0)
        scaled = values.mul_(lift[:, None]).mul_(factor[:, None]).round_()
        value = scaled.to(torch.int32)
        value += s << FRACTION_BITS
        self._add_fractions(value, key, bucket)
        value >>= FRACTION_BITS
        value -= s
        return value

    def _add_fractions(self, value: torch.Tensor, key: int, bucket: int) -> None:
        count, length = value.shape
        if self.codec.rounding == "nearest":
            value += 1 << (FRACTION_BITS - 1)
            return
        per_bucket = self.codec.bucket_size // 2
        drawn = words(key, bucket * per_bucket, count * per_bucket, value.device).view(count, per_bucket)
        half = -(-length // 2)
        value[:, :half] += drawn[:, :half] & 0xFFFF
        value[:, half:] += shift_right(drawn[:, : length - half], 16)


def dequantize(levels: torch.Tensor, scales: torch.Tensor, largest: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.dequantize`."""
    return scales[:, None] * (levels.to(torch.float32) * unit(largest))


def unit(largest: int) -> float:
    """1 / largest, in float32."""
    return float(np.float32(1) / np.float32(largest))
