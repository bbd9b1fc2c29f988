"""Codecs whose codes are made one after the other: on the CPU, from a copy of what is on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.torch.plain import apply
from hvd_qsgd.kernels.torch.readback import Apply, LookingKernels, Write
from hvd_qsgd.kernels.torch.transfer import to_device


@dataclass(frozen=True)
class HostKernels(LookingKernels):
    """The Numba kernels of a codec, for tensors of any device; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Codec

    @property
    def on_host(self) -> Kernels:
        return kernels_for(self.codec, "numba")

    def prepare_encode(self, x: torch.Tensor, key: int = 0, first: int = 0, keep_error: bool = False) -> Looks[Write]:
        (values,) = yield [x]
        payload = np.empty(self.codec.payload_size(len(values)), np.uint8)
        payload = payload[: self.on_host.encode_into(values, payload, key, first)]
        error = values.copy() if keep_error else None
        if error is not None:
            self.on_host.decode_into(payload, error, "subtract")

        def write(out: torch.Tensor) -> int:
            out[: len(payload)] = to_device(payload, out.device)
            if error is not None:
                set_or_add(error, x, "set")
            return len(payload)

        return write

    def prepare_decode(self, payload: torch.Tensor, length: int) -> Looks[Apply]:
        (data,) = yield [payload]
        values = np.empty(length, np.float32)
        self.on_host.decode_into(data, values)
        return functools.partial(set_or_add, values)

    def prepare_average(
        self, message: torch.Tensor, spans: Sequence[tuple[int, int]], length: int
    ) -> Looks[Callable[[torch.Tensor], None]]:
        payloads = yield [message[start:stop] for start, stop in spans]
        ends = np.cumsum([len(payload) for payload in payloads]).tolist()
        mean = np.empty(length, np.float32)
        self.on_host.average_into(np.concatenate(payloads), list(zip([0, *ends], ends)), mean)
        return functools.partial(set_or_add, mean, mode="set")


def set_or_add(values: np.ndarray, out: torch.Tensor, mode: str) -> None:
    """Set, add or subtract values of the host."""
    apply(out, to_device(values, out.device), mode)
