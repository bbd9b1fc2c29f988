"""Bytes between the host and a device, without waiting for the device.

A copy to or from memory that is not pinned makes the host wait until everything that the stream holds
is done. What is pinned here belongs to torch's allocator, which does not give it away before the
copies that use it are done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_device(data: bytes | np.ndarray, device: torch.device) -> torch.Tensor:
    """An array, or bytes as uint8 of shape (bytes,), on a device; the copy goes to its current stream."""
    host = torch.from_numpy(data if isinstance(data, np.ndarray) else np.frombuffer(bytearray(data), np.uint8))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class ToPinned:
    """A device's tensor on its way to pinned memory: a handle like those of collectives.

    The copy waits for what the device's current stream holds now, and nothing waits for the copy but
    :meth:`result`.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))

    def done(self) -> bool:
        return bool(self._copied.query())

    def result(self) -> torch.Tensor:
        """The tensor in pinned memory, once it is there."""
        self._copied.synchronize()
        return self._host


class OnHost:
    """The same for whoever wants a NumPy array, of a tensor on any device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = ToPinned(tensor) if tensor.device.type == "cuda" else None
        self._tensor = tensor

    def done(self) -> bool:
        return self._copy is None or self._copy.done()

    def result(self) -> Any:
        return (self._tensor.cpu() if self._copy is None else self._copy.result()).numpy()
