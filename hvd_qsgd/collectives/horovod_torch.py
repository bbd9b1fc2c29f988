"""Collectives over Horovod with torch tensors; NumPy arrays are wrapped without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd.collectives.base import Names
from hvd_qsgd.errors import ExchangeError, UnsupportedError
from hvd_qsgd.exchanges.base import AllGather, AllReduce, AllToAll, Request


def wrap(array: Any) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


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
            if "mismatched" in str(error).lower():
                raise ExchangeError(
                    f"{self.request.name}: the ranks started different collectives ({error}). "
                    f"All ranks must run the same model with the same compressor settings."
                ) from error
            # Of the same type, because elastic jobs go on from it.
            raise HorovodInternalError(
                f"{error} It was waiting for {self.request.name}, named after tensors; which ranks did not come, "
                f"Horovod's log says."
            ) from error
        numpy = isinstance(self.request.array, np.ndarray)
        if isinstance(self.request, AllToAll):
            received, sizes = outcome
            return (received.numpy() if numpy else received), sizes.tolist()
        return outcome.numpy() if numpy else outcome


class HorovodCollectives:
    """The ranks of a Horovod process set.

    Rank and size are asked anew each time, because an elastic job changes them.
    """

    def __init__(self, process_set: Any = hvd.global_process_set) -> None:
        self.process_set = process_set

    @property
    def rank(self) -> int:
        return int(self.process_set.rank())

    @property
    def ranks(self) -> int:
        return int(self.process_set.size())

    def start(self, request: Request) -> HorovodHandle:
        tensor, name = wrap(request.array), Names.of(request.name)
        if isinstance(request, AllGather):
            return HorovodHandle(request, hvd.allgather_async(tensor, name=name, process_set=self.process_set))
        if isinstance(request, AllToAll):
            splits = torch.tensor(request.splits, dtype=torch.int32)
            return HorovodHandle(request, hvd.alltoall_async(tensor, splits, name=name, process_set=self.process_set))
        assert isinstance(request, AllReduce)
        operation = hvd.Max if request.op == "max" else hvd.Sum
        return HorovodHandle(
            request, hvd.allreduce_async_(tensor, name=name, op=operation, process_set=self.process_set)
        )
