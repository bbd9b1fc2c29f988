"""Collectives over Horovod with torch tensors; NumPy arrays are wrapped without a copy.

Of Horovod 0.28.1 with tensors on a GPU one has to know (``torch/mpi_ops_v2.cc``, ``adapter_v2.cc``, ``ready_event.cc``,
``common/ops/gpu_operations.cc``):

* Its ready event is recorded on the calling thread's current stream when a collective is started.
* With NCCL a collective is done when the GPU is done with it; but with HOROVOD_ENABLE_ASYNC_COMPLETION it is done at
  once, and only the *default* stream waits for the GPU.
* What an allgather or an alltoall returns is allocated by a thread of Horovod's, on the default stream.
* Without NCCL the result is copied from memory that is not pinned, on the default stream, and Horovod's own thread
  waits until everything is done that this stream holds, the backward pass with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd.collectives.base import Handle, Names, OfProcessSet
from hvd_qsgd.errors import ExchangeError, UnsupportedError
from hvd_qsgd.exchanges.base import AllGather, AllReduce, AllToAll, Request, ToHost
from hvd_qsgd.kernels.torch.transfer import OnHost, ToPinned


def wrap(array: Any) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def set_by_environment(name: str) -> bool:
    """Whether a switch of Horovod's is on, by its own reading."""
    try:
        return int(os.environ.get(name, "0")) > 0
    except ValueError:
        return False


def ends_early() -> bool:
    """Whether a collective is called done while the GPU still works on it."""
    return set_by_environment("HOROVOD_ENABLE_ASYNC_COMPLETION") or set_by_environment("HOROVOD_ENABLE_XLA_OPS")


def mismatched(error: HorovodInternalError) -> bool:
    """Whether ranks came with different things under one name."""
    return "mismatched" in str(error).lower()


@dataclass
class HorovodHandle:
    request: Request
    number: int

    def done(self) -> bool:
        return bool(hvd.poll(self.number))

    def result(self) -> Any:
        try:
            outcome = hvd.synchronize(self.number)
        except HorovodInternalError as error:
            if "join" in str(error).lower():
                raise UnsupportedError(
                    f"{self.request.name}: a rank has called hvd.join(), and Horovod cannot gather with a joined rank "
                    f'({error}). Use exchange="allreduce", which can.'
                ) from error
            if mismatched(error):
                raise ExchangeError(
                    f"{self.request.name}: the ranks started different collectives ({error}). "
                    f"All ranks must run the same model with the same compressor settings."
                ) from error
            # Of the same type, because elastic jobs go on from it.
            raise HorovodInternalError(
                f"{error} It was waiting for {self.request.name}, named after tensors; which ranks did not come, "
                f"Horovod's log says."
            ) from error
        if isinstance(self.request, AllToAll):
            received, sizes = outcome
            return self._taken(received), sizes.tolist()
        return self._taken(outcome)

    def _taken(self, tensor: torch.Tensor) -> Any:
        """The tensor as an array like that of the request, to be used on the current stream."""
        if isinstance(self.request.array, np.ndarray):
            return tensor.numpy()
        if tensor.device.type == "cuda":
            current = torch.cuda.current_stream(tensor.device)
            if ends_early():
                current.wait_stream(torch.cuda.default_stream(tensor.device))
            tensor.record_stream(current)
        return tensor


@dataclass
class StagedHandle:
    """A collective of the host, between pinned memory and a device."""

    inner: HorovodHandle
    device: torch.device

    def done(self) -> bool:
        return self.inner.done()

    def result(self) -> Any:
        outcome = self.inner.result()
        if isinstance(self.inner.request, AllToAll):
            received, sizes = outcome
            return self._sent(received), sizes
        return self._sent(outcome)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        # What was reduced in place is pinned already, and is not copied again.
        return tensor.pin_memory().to(self.device, non_blocking=True)


class HorovodCollectives(OfProcessSet):
    """The ranks of a Horovod process set."""

    def __init__(self, process_set: Any = hvd.global_process_set) -> None:
        super().__init__(process_set)

    def start(self, request: Request) -> Handle:
        tensor = wrap(request.array)
        if isinstance(request, ToHost):
            return OnHost(tensor)
        if tensor.device.type == "cuda" and not hvd.nccl_built():
            # Horovod knows nothing of copies to pinned memory: this one must have ended.
            return StagedHandle(self._start(request, ToPinned(tensor).result()), tensor.device)
        return self._start(request, tensor)

    def _start(self, request: Request, tensor: torch.Tensor) -> HorovodHandle:
        name = Names.of(request.name)
        if isinstance(request, AllGather):
            return HorovodHandle(request, hvd.allgather_async(tensor, name=name, process_set=self.process_set))
        if isinstance(request, AllToAll):
            splits = torch.tensor(request.splits, dtype=torch.int32, device="cpu")
            return HorovodHandle(request, hvd.alltoall_async(tensor, splits, name=name, process_set=self.process_set))
        assert isinstance(request, AllReduce)
        operation = hvd.Max if request.op == "max" else hvd.Sum
        return HorovodHandle(
            request, hvd.allreduce_async_(tensor, name=name, op=operation, process_set=self.process_set)
        )
