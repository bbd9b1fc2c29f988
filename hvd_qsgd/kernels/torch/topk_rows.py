"""RowTopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_rows`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.codecs.topk_rows import INFINITY_BITS, RowTopK
from hvd_qsgd.errors import PayloadError
from hvd_qsgd.kernels.torch.bits import pack_stream, unpack_stream
from hvd_qsgd.kernels.torch.plain import apply, reinterpret
from hvd_qsgd.kernels.torch.readback import Apply, LookingKernels, Write


@dataclass(frozen=True)
class RowTopKKernels(LookingKernels):
    """torch implementation of a RowTopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: RowTopK

    def prepare_encode(self, x: torch.Tensor, key: int = 0, first: int = 0, keep_error: bool = False) -> Looks[Write]:
        yield from ()
        return functools.partial(self._write, x, keep_error)

    def _write(self, x: torch.Tensor, keep_error: bool, out: torch.Tensor) -> int:
        codec = self.codec
        size, at = codec.payload_size(len(x)), 4 * codec.count(len(x))
        codec.check_room(out, size)
        full = len(x) // codec.row * codec.row
        parts = [self._of_rows(x[:full].view(-1, codec.row)), self._of_rows(x[full:].view(1, -1))]
        values, positions = (torch.cat(several) for several in zip(*parts))
        out[:at] = reinterpret(values, torch.uint8)
        out[at:size] = pack_stream(positions, codec.width)
        if keep_error:
            self._apply(values, positions + self._starts(len(x), x.device), x, "subtract")
        return size

    def prepare_decode(self, payload: torch.Tensor, length: int) -> Looks[Apply]:
        codec = self.codec
        codec.check_payload(payload, length)
        at = 4 * codec.count(length)
        values = reinterpret(payload[:at], torch.float32)
        positions = unpack_stream(payload[at:], len(values), codec.width)
        places = positions + self._starts(length, payload.device)
        if length:
            good = (places.diff() > 0).all() & (positions < codec.row).all() & (places[-1] < length)
            (seen,) = yield [good.view(1)]
            if not seen[0]:
                raise PayloadError(
                    f"A topk_rows payload of {length} elements holds positions that are not ascending or too large."
                )
        return functools.partial(self._apply, values, places)

    def _starts(self, length: int, device: torch.device) -> torch.Tensor:
        """For each kept value where its row starts."""
        codec = self.codec
        full, tail = divmod(length, codec.row)
        starts = torch.arange(full, device=device).repeat_interleave(codec.kept(codec.row)) * codec.row
        return torch.cat([starts, starts.new_full((codec.kept(tail),), full * codec.row)])

    def _apply(self, values: torch.Tensor, places: torch.Tensor, out: torch.Tensor, mode: str) -> None:
        """Set, add or subtract values at their places; rows of which one is NaN become NaN."""
        row = self.codec.row
        dense = torch.zeros_like(out)
        dense[places] = values
        spoiled = torch.zeros(-(-len(out) // row), dtype=torch.int32, device=out.device)
        spoiled.index_add_(0, places // row, values.isnan().to(torch.int32))
        dense.masked_fill_(spoiled.bool().repeat_interleave(row)[: len(out)], float("nan"))
        apply(out, dense, mode)

    def _of_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and positions of the largest of each row, flat."""
        length = rows.shape[1]
        count = self.codec.kept(length)
        magnitudes = (rows.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
        # Magnitude above, position from the end below: a larger key is a larger or an earlier value.
        keys = (magnitudes << 16) | (length - 1 - torch.arange(length, device=rows.device))
        positions = keys.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        values = rows.gather(1, positions)
        if length:
            spoiled = magnitudes.amax(dim=1) >= INFINITY_BITS
            values = torch.where(spoiled[:, None], torch.full_like(values, float("nan")), values)
        return values.reshape(-1), positions.reshape(-1)
