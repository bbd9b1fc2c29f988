"""QSGD in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.bits import planes_size
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.kernels.torch.bits import pack_planes, unpack_planes
from hvd_qsgd.kernels.torch.plain import apply, reinterpret
from hvd_qsgd.random_words import MULTIPLIER_1, MULTIPLIER_2

MASK32 = 0xFFFFFFFF


def words(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """:func:`hvd_qsgd.random_words.words` as int64 values below 2^32."""

    def multiply(value: torch.Tensor, factor: int) -> torch.Tensor:
        # In halves, because the product of two 32-bit numbers does not fit a signed int64.
        low = value * (factor & 0xFFFF)
        high = (value * (factor >> 16)) & 0xFFFF
        return (low + (high << 16)) & MASK32

    h = (torch.arange(count, dtype=torch.int64, device=device) + ((first + key) & MASK32)) & MASK32
    h = multiply(h ^ (h >> 16), MULTIPLIER_1)
    h = multiply(((h ^ (h >> 15)) + (key >> 32)) & MASK32, MULTIPLIER_2)
    return h ^ (h >> 15)


def l2_norms(rows: torch.Tensor) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.l2_norms`: the same sums in the same order."""
    padded = torch.nn.functional.pad(rows.to(torch.float64), (0, -rows.shape[1] % NORM_LANES)).square()
    sums = torch.zeros((rows.shape[0], NORM_LANES), dtype=torch.float64, device=rows.device)
    for start in range(0, padded.shape[1], NORM_LANES):
        sums += padded[:, start : start + NORM_LANES]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0].sqrt().to(torch.float32)


@dataclass(frozen=True)
class QSGDKernels(Kernels):
    """torch implementation of a QSGD codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: QSGD

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

    def agree_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.scales(x).view(torch.int32))

    def to_lanes(
        self, x: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, key: int = 0, first: int = 0
    ) -> None:
        width = self.codec.lane_width(ranks)
        lanes = 32 // width
        levels = torch.zeros(len(out) * lanes, dtype=torch.int64, device=x.device)
        at = 0
        for rows, scales, bucket in self._rows(x, agreed.view(torch.float32), first):
            levels[at : at + rows.numel()] = self._levels(rows, scales, key, bucket).reshape(-1)
            at += rows.numel()
        weights = 1 << (width * torch.arange(lanes, dtype=torch.int64, device=x.device))
        out.copy_((levels.reshape(-1, lanes) * weights).sum(dim=1))

    def from_lanes(self, sums: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, count: int) -> None:
        largest = self.codec.levels * ranks
        width = self.codec.lane_width(ranks)
        shifts = width * torch.arange(32 // width, dtype=torch.int64, device=out.device)
        offset = sum(largest << (width * lane) for lane in range(32 // width))
        digits = ((sums.to(torch.int64) + offset)[:, None] >> shifts) & ((1 << width) - 1)
        levels = digits.reshape(-1)[: out.numel()] - largest
        at = 0
        for rows, scales, _ in self._rows(out, agreed.view(torch.float32), 0):
            rows.copy_(
                dequantize(levels[at : at + rows.numel()].reshape(rows.shape), scales, self.codec.levels * count)
            )
            at += rows.numel()

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`hvd_qsgd.codecs.qsgd.QSGD.scales`."""
        scales = torch.empty(self.codec.buckets(x.numel()), dtype=torch.float32, device=x.device)
        for rows, part, _ in self._rows(x, scales, 0):
            largest = (rows.view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
            part.copy_(largest.view(torch.float32) if self.codec.norm == "max" else l2_norms(rows))
            part[(largest >= INFINITY_BITS) | part.isinf()] = float("nan")
        return scales

    def _rows(
        self, x: torch.Tensor, scales: torch.Tensor, first: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        size = self.codec.bucket_size
        full = x.numel() // size
        bucket = first // size
        if full:
            yield x[: full * size].view(full, size), scales[:full], bucket
        if full * size < x.numel():
            yield x[full * size :].view(1, -1), scales[full:], bucket + full

    def _levels(self, rows: torch.Tensor, scales: torch.Tensor, key: int, bucket: int) -> torch.Tensor:
        s = self.codec.levels
        unusable = ~((scales > 0) & (scales < float("inf")))
        lift = torch.where(scales < float(TINY), float(1 / TINY), 1.0).to(torch.float32)
        safe = torch.where(unusable, 1.0, scales * lift)
        factor = torch.full_like(safe, s << FRACTION_BITS) / safe
        usable = torch.where(unusable[:, None], 0.0, rows)
        fixed = torch.round((usable * lift[:, None]) * factor[:, None]).to(torch.int32)
        value = fixed + self._fractions(rows, key, bucket) + (s << FRACTION_BITS)
        return (value >> FRACTION_BITS) - s

    def _fractions(self, rows: torch.Tensor, key: int, bucket: int) -> torch.Tensor:
        count, length = rows.shape
        if self.codec.rounding == "nearest":
            return torch.full_like(rows, 1 << (FRACTION_BITS - 1), dtype=torch.int32)
        per_bucket = self.codec.bucket_size // 2
        drawn = words(key, bucket * per_bucket, count * per_bucket, rows.device).view(count, per_bucket)
        drawn = drawn[:, : -(-length // 2)]
        return torch.cat([drawn & 0xFFFF, drawn >> 16], dim=1)[:, :length].to(torch.int32)


def dequantize(levels: torch.Tensor, scales: torch.Tensor, largest: int) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.dequantize`."""
    unit = torch.tensor(1.0, dtype=torch.float32, device=scales.device) / largest
    return scales[:, None] * (levels.to(torch.float32) * unit)
