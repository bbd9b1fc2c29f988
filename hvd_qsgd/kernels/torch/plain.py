"""Identity and half precision in torch operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.codecs.base import Kernels, unknown_mode
from hvd_qsgd.codecs.cast import NAN_BITS, Cast
from hvd_qsgd.codecs.identity import Identity


def apply(out: torch.Tensor, values: torch.Tensor, mode: str) -> None:
    """:func:`hvd_qsgd.codecs.base.combine` on torch tensors."""
    if mode == "set":
        out.copy_(values)
    elif mode == "add":
        out.add_(values)
    elif mode == "subtract":
        out.sub_(values)
    else:
        raise unknown_mode(mode)


def reinterpret(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of ``data`` as elements of ``dtype``, in a copy that is aligned wherever ``data`` stands."""
    # An empty tensor that came from NumPy has stride 0, and view refuses it.
    return data.clone().view(dtype) if data.numel() else data.new_empty(0, dtype=dtype)


@dataclass(frozen=True)
class IdentityKernels(Kernels):
    codec: Identity

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        out[: 4 * x.numel()] = reinterpret(x, torch.uint8)
        return 4 * x.numel()

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        self.codec.check_payload(payload, out.numel())
        apply(out, reinterpret(payload, torch.float32), mode)


@dataclass(frozen=True)
class CastKernels(Kernels):
    codec: Cast

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.codec.dtype == "float16" else torch.bfloat16

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        halves = reinterpret(x.to(self.dtype), torch.int16).masked_fill_(x.isnan(), NAN_BITS[self.codec.dtype])
        out[: 2 * x.numel()] = reinterpret(halves, torch.uint8)
        return 2 * x.numel()

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        self.codec.check_payload(payload, out.numel())
        apply(out, reinterpret(payload, self.dtype).to(torch.float32), mode)
