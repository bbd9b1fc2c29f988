"""QSGD on a GPU. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`.

A bucket with max norm is read once and its payload written once: scale, rounding, random words
and packing stay in registers. What that does not suit, which is the short last bucket, long
buckets and L2 norms, is read once for the scales and once more for the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import mode_number
from hvd_qsgd.codecs.bits import plane_widths, planes_size
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.kernels.torch.qsgd import QSGDKernels as TorchKernels
from hvd_qsgd.kernels.torch.qsgd import signed, unit
from hvd_qsgd.kernels.triton.decode import decode, decode_buckets
from hvd_qsgd.kernels.triton.encode import bucket_scales, encode_buckets, encode_scaled
from hvd_qsgd.kernels.triton.lanes import from_lanes, to_lanes
from hvd_qsgd.kernels.triton.launch import blocks, launch, tile

#: Longest bucket whose elements fit into the registers of a program.
LONGEST = 4096


@dataclass(frozen=True)
class Group:
    """Buckets of one length: all full ones, or the short last one."""

    first: int
    count: int
    length: int
    #: ``length`` as a constant of the kernel, and as a number, of which one is 0. Only that of full
    #: buckets is a constant, because each new one compiles the kernel anew.
    constant: int
    tail: int

    def grid(self, columns: int, width: int = 4) -> tuple[tuple[int, int], dict[str, int]]:
        """A tile over ``columns`` results of ``width`` bytes of each bucket, and the programs that it takes."""
        rows, wide = tile(self.count, columns, width)
        return (blocks(self.count, rows), blocks(columns, wide)), {"ROWS": rows, "COLUMNS": wide}


@dataclass(frozen=True)
class QSGDKernels(TorchKernels):
    """Triton implementation of a QSGD codec; torch operations are left for payloads at uneven distances."""

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size = codec.payload_size(len(x))
        # Compiled code writes without looking.
        codec.check_room(out, size)
        for group in self._groups(len(x)):
            part = self._part(group, x)
            scales = out[4 * group.first :]
            codes = out[self._codes_at(group, len(x)) :]
            draw = self._draw(key, first, group)
            constants = {"BITS": codec.bits, "STOCHASTIC": codec.rounding == "stochastic"}
            constants["ALIGNED"] = self._aligned(group, scales, codes)
            if group.constant and codec.norm == "max" and codec.bucket_size <= LONGEST:
                programs, shape = self._whole(group, x)
                launch(encode_buckets, programs, (part, scales, codes), group.count, *draw, **constants, **shape)
            else:
                self._scales(part, scales, group)
                grid, shape = group.grid(planes_size(group.length, plane_widths(codec.bits)[0]))
                numbers = (group.count, group.tail, *draw)
                shape["LENGTH"] = group.constant
                launch(encode_scaled, grid, (part, scales, codes), *numbers, **constants, **shape)
        return size

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        self.codec.check_payload(payload, len(out))
        mode_number(mode)
        self._decode(payload, out, 1, 0, mode)

    def prepare_average(
        self, message: torch.Tensor, spans: Sequence[tuple[int, int]], length: int
    ) -> Looks[Callable[[torch.Tensor], None]]:
        starts = [start for start, _ in spans]
        steps = {after - before for before, after in zip(starts, starts[1:])} or {0}
        if len(steps) > 1:
            return (yield from super().prepare_average(message, spans, length))
        for start, stop in spans:
            self.codec.check_payload(message[start:stop], length)
        first, step = message[starts[0] :], steps.pop()
        return lambda out: self._decode(first, out, len(spans), step, "average")

    def agree_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        for group in self._groups(len(x)):
            self._scales(self._part(group, x), out[group.first :].view(torch.uint8), group)

    def to_lanes(
        self, x: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, key: int = 0, first: int = 0
    ) -> None:
        codec = self.codec
        lane = codec.lane_width(ranks)
        for group in self._groups(len(x)):
            grid, shape = group.grid(blocks(group.length, 32 // lane))
            target = out[group.first * blocks(codec.bucket_size, 32 // lane) :]
            tensors = (self._part(group, x), agreed[group.first :].view(torch.uint8), target)
            constants = {"LENGTH": group.constant, "BITS": codec.bits, "LANE": lane}
            numbers = (group.count, group.tail, *self._draw(key, first, group))
            launch(to_lanes, grid, tensors, *numbers, STOCHASTIC=codec.rounding == "stochastic", **constants, **shape)

    def from_lanes(self, sums: torch.Tensor, agreed: torch.Tensor, ranks: int, out: torch.Tensor, count: int) -> None:
        codec = self.codec
        lane = codec.lane_width(ranks)
        largest = ranks * codec.levels
        offset = signed(sum(largest << (lane * number) for number in range(32 // lane)))
        for group in self._groups(len(out)):
            grid, shape = group.grid(group.length, out.element_size())
            source = sums[group.first * blocks(codec.bucket_size, 32 // lane) :]
            tensors = (source, agreed[group.first :].view(torch.uint8), self._part(group, out))
            numbers = (group.count, group.tail, offset, signed(largest), unit(codec.levels * count))
            launch(from_lanes, grid, tensors, *numbers, LENGTH=group.constant, LANE=lane, **shape)

    def _groups(self, length: int) -> Iterator[Group]:
        size = self.codec.bucket_size
        full, tail = divmod(length, size)
        if full:
            yield Group(0, full, size, size, 0)
        if tail:
            yield Group(full, 1, tail, 0, tail)

    def _whole(self, group: Group, x: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
        """A tile of which each element stands for eight of a bucket, and the programs that it takes."""
        rows, columns = tile(group.count, self.codec.bucket_size // 8, x.element_size())
        return (blocks(group.count, rows),), {"ROWS": rows, "COLUMNS": columns, "BUCKET": self.codec.bucket_size}

    def _part(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        return x[group.first * self.codec.bucket_size :]

    def _codes_at(self, group: Group, length: int) -> int:
        """Where the codes of a group stand in the payload of ``length`` elements."""
        return 4 * self.codec.buckets(length) + group.first * planes_size(self.codec.bucket_size, self.codec.bits)

    def _scales(self, x: torch.Tensor, out: torch.Tensor, group: Group) -> None:
        rows, columns = tile(group.count, group.length, x.element_size())
        shape = {"ROWS": rows, "COLUMNS": columns, "LENGTH": group.constant}
        grid = (blocks(group.count, rows),)
        launch(bucket_scales, grid, (x, out), group.count, group.tail, L2=self.codec.norm == "l2", **shape)

    def _decode(self, payload: torch.Tensor, out: torch.Tensor, ranks: int, step: int, mode: str) -> None:
        codec = self.codec
        for group in self._groups(len(out)):
            tensors = (payload[4 * group.first :], payload[self._codes_at(group, len(out)) :], self._part(group, out))
            halves = ranks & (ranks - 1) == 0
            numbers = (ranks, step, unit(codec.levels), 1 / ranks if halves else float(ranks))
            constants = {"ALIGNED": self._aligned(group, *tensors[:2], step), "BITS": codec.bits, "MODE": mode}
            constants["HALVES"] = halves
            if group.constant and codec.bucket_size <= LONGEST:
                programs, shape = self._whole(group, out)
                launch(decode_buckets, programs, tensors, group.count, *numbers, **constants, **shape)
            else:
                grid, shape = group.grid(group.length, out.element_size())
                lengths = (group.count, group.tail)
                launch(decode, grid, tensors, *lengths, *numbers, LENGTH=group.constant, **constants, **shape)

    def _aligned(self, group: Group, scales: torch.Tensor, codes: torch.Tensor, step: int = 0) -> bool:
        """Whether every plane of the buckets, and those ``step`` bytes after, begins at a multiple of 4 bytes."""
        # Planes take m, 2m, 4m or 8m bytes, m = bucket_size / 8: if all together are a multiple of 4, each is.
        size = planes_size(self.codec.bucket_size, self.codec.bits)
        starts = (scales.data_ptr(), codes.data_ptr(), step, size)
        return bool(group.constant) and not any(start % 4 for start in starts)

    def _draw(self, key: int, first: int, group: Group) -> tuple[int, int, int]:
        """First random word and both halves of the key, as int32."""
        bucket = first // self.codec.bucket_size + group.first
        return signed(bucket * (self.codec.bucket_size // 2)), signed(key), signed(key >> 32)
