"""Sign in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.sign`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.sign import Sign
from hvd_qsgd.kernels.torch.bits import pack_bits, unpack_bits
from hvd_qsgd.kernels.torch.plain import apply, reinterpret
from hvd_qsgd.kernels.torch.qsgd import row_sums


def mean_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """:func:`hvd_qsgd.codecs.sign.mean_magnitudes`."""
    means = (row_sums(rows.to(torch.float64).abs()) / rows.shape[1]).to(torch.float32)
    return torch.where(means.isfinite(), means, torch.full_like(means, float("nan")))


@dataclass(frozen=True)
class SignKernels(Kernels):
    """torch implementation of a Sign codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Sign

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        size, at = self.codec.payload_size(len(x)), 4 * self.codec.buckets(len(x))
        self.codec.check_room(out, size)
        full = len(x) // self.codec.bucket_size * self.codec.bucket_size
        scales = mean_magnitudes(x[:full].view(-1, self.codec.bucket_size))
        if full < len(x):
            scales = torch.cat([scales, mean_magnitudes(x[full:].view(1, -1))])
        out[:at] = reinterpret(scales, torch.uint8)
        out[at:size] = pack_bits((x < 0).to(torch.uint8))
        return size

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        self.codec.check_payload(payload, len(out))
        at = 4 * self.codec.buckets(len(out))
        scales = reinterpret(payload[:at], torch.float32).repeat_interleave(self.codec.bucket_size)[: len(out)]
        negative = unpack_bits(payload[at:])[: len(out)].bool()
        apply(out, torch.where(negative, -scales, scales), mode)
