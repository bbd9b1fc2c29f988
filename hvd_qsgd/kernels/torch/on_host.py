"""Codecs whose codes are made one after the other: on the CPU, from a copy of what is on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.torch.plain import apply


@dataclass(frozen=True)
class HostKernels(Kernels):
    """The Numba kernels of a codec, for tensors of any device; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Codec

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        payload = np.empty(self.codec.payload_size(len(x)), np.uint8)
        used = kernels_for(self.codec, "numba").encode_into(x.cpu().numpy(), payload, key, first)
        out[:used] = torch.from_numpy(payload[:used])
        return used

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        values = np.empty(len(out), np.float32)
        kernels_for(self.codec, "numba").decode_into(payload.cpu().numpy(), values)
        apply(out, torch.from_numpy(values).to(out.device), mode)
