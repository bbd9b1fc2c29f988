"""RowTopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_rows`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.topk_rows import INFINITY_BITS, RowTopK
from hvd_qsgd.errors import PayloadError
from hvd_qsgd.kernels.torch.bits import pack_stream, unpack_stream
from hvd_qsgd.kernels.torch.plain import apply, reinterpret


@dataclass(frozen=True)
class RowTopKKernels(Kernels):
    """torch implementation of a RowTopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: RowTopK

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        size, at = codec.payload_size(len(x)), 4 * codec.count(len(x))
        codec.check_room(out, size)
        full = len(x) // codec.row * codec.row
        parts = [self._of_rows(x[:full].view(-1, codec.row)), self._of_rows(x[full:].view(1, -1))]
        out[:at] = reinterpret(torch.cat([values for values, _ in parts]), torch.uint8)
        out[at:size] = pack_stream(torch.cat([positions for _, positions in parts]), codec.width)
        return size

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        codec, length = self.codec, len(out)
        codec.check_payload(payload, length)
        at = 4 * codec.count(length)
        values = reinterpret(payload[:at], torch.float32)
        full, tail = divmod(length, codec.row)
        starts = torch.arange(full, device=out.device).repeat_interleave(codec.kept(codec.row)) * codec.row
        starts = torch.cat([starts, starts.new_full((codec.kept(tail),), full * codec.row)])
        positions = unpack_stream(payload[at:], len(values), codec.width)
        places = positions + starts
        if len(places) and (
            bool((places.diff() <= 0).any()) or bool((positions >= codec.row).any()) or int(places[-1]) >= length
        ):
            raise PayloadError(
                f"A topk_rows payload of {length} elements holds positions that are not ascending or too large."
            )
        dense = torch.zeros_like(out)
        dense[places] = values
        for start in starts[values.isnan()].unique().tolist():
            dense[start : start + codec.row] = float("nan")
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
