"""RandomK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.random_k`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.random_k import KEY_BYTES, RandomK
from hvd_qsgd.kernels.torch.plain import apply, reinterpret
from hvd_qsgd.kernels.torch.qsgd import words
from hvd_qsgd.kernels.torch.transfer import to_device


@dataclass(frozen=True)
class RandomKKernels(Kernels):
    """torch implementation of a RandomK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: RandomK

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        values = x.new_empty(self.codec.sum_length(len(x)))
        self.to_sum(x, values, key)
        size = self.codec.payload_size(len(x))
        out[:KEY_BYTES] = to_device(key.to_bytes(KEY_BYTES, "little"), x.device)
        out[KEY_BYTES:size] = reinterpret(values, torch.uint8)
        return size

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        self.codec.check_payload(payload, len(out))
        key = int.from_bytes(payload[:KEY_BYTES].cpu().numpy().tobytes(), "little")
        values = torch.empty_like(out)
        self.from_sum(reinterpret(payload[KEY_BYTES:], torch.float32), values, 1, key)
        apply(out, values, mode)

    def to_sum(self, x: torch.Tensor, out: torch.Tensor, key: int, first: int = 0) -> None:
        positions, sizes = self._positions(len(x), key, x.device)
        out.copy_(x[positions])
        if self.codec.unbiased:
            out *= sizes.to(torch.float32)
        out.masked_fill_(~x.isfinite().all(), float("nan"))

    def from_sum(self, sums: torch.Tensor, out: torch.Tensor, count: int, key: int, first: int = 0) -> None:
        positions, _ = self._positions(len(out), key, out.device)
        out.zero_()
        if len(sums):
            out.masked_fill_(sums[0].isnan(), float("nan"))
        out[positions] = sums / count

    def _positions(self, length: int, key: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.codec.sum_length(length)
        edges = torch.arange(count + 1, dtype=torch.int64, device=device) * length // max(count, 1)
        sizes = edges.diff()
        drawn = words(key, 0, count, device).to(torch.int64) & 0xFFFFFFFF
        return edges[:-1] + ((drawn * sizes) >> 32), sizes
