"""MinMax in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.minmax`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.minmax import LIMITS_BYTES, MinMax, limits
from hvd_qsgd.kernels.torch.bits import pack_planes, unpack_planes
from hvd_qsgd.kernels.torch.plain import apply


@dataclass(frozen=True)
class MinMaxKernels(Kernels):
    """torch implementation of a MinMax codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: MinMax

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        ends = torch.stack(torch.aminmax(x)).cpu().numpy() if len(x) else np.empty(0, np.float32)
        low, high = limits(ends)
        head = np.array([low, high], "<f4").view(np.uint8)
        out[:LIMITS_BYTES] = torch.from_numpy(head).to(out.device)
        codes = torch.zeros((1, len(x)), dtype=torch.uint8, device=x.device)
        if low < high:
            offset = x.to(torch.float64) - float(low)
            codes[0] = torch.floor(offset * float(codec.levels_per_unit(low, high)) + 0.5).to(torch.uint8)
        size = codec.payload_size(len(x))
        out[LIMITS_BYTES:size] = pack_planes(codes, codec.bits).view(-1)
        return size

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        codec = self.codec
        codec.check_payload(payload, len(out))
        table = torch.from_numpy(codec.table(payload[:LIMITS_BYTES].cpu().numpy())).to(out.device)
        codes = unpack_planes(payload[LIMITS_BYTES:].view(1, -1), len(out), codec.bits)[0]
        apply(out, table[codes.to(torch.int64)], mode)
