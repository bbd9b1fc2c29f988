"""Collectives over mpi4py, on NumPy arrays, without pickling.

MPI matches collectives by the order of the calls, not by name: all ranks must run the same
exchanges in the same order, one at a time (:func:`hvd_qsgd.reduction.progress.run_exchange`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_qsgd.exchanges.base import AllGather, AllReduce, AllToAll, Request


@dataclass
class MPIHandle:
    request: MPI.Request
    outcome: Callable[[], Any]
    #: What MPI reads from until the request is complete.
    buffers: tuple[Any, ...]

    def done(self) -> bool:
        return bool(self.request.Test())

    def result(self) -> Any:
        self.request.Wait()
        return self.outcome()


class MPICollectives:
    """The ranks of a communicator; it is duplicated, so that other traffic cannot be mistaken for ours."""

    def __init__(self, communicator: MPI.Intracomm | None = None) -> None:
        self.communicator = (communicator or MPI.COMM_WORLD).Dup()
        self.rank: int = self.communicator.Get_rank()
        self.ranks: int = self.communicator.Get_size()

    def start(self, request: Request) -> MPIHandle:
        array = np.ascontiguousarray(request.array)
        if isinstance(request, AllGather):
            sizes = np.empty(self.ranks, np.int64)
            self.communicator.Allgather(np.array([len(array)], np.int64), sizes)
            gathered = np.empty(int(sizes.sum()), np.uint8)
            pending = self.communicator.Iallgatherv(array, [gathered, sizes, MPI.BYTE])
            return MPIHandle(pending, lambda: gathered, (array,))
        if isinstance(request, AllToAll):
            splits = np.array(request.splits)
            sizes = np.empty(self.ranks, np.int64)
            self.communicator.Alltoall(splits.astype(np.int64), sizes)
            received = np.empty(int(sizes.sum()), np.uint8)
            pending = self.communicator.Ialltoallv([array, splits, MPI.BYTE], [received, sizes, MPI.BYTE])
            return MPIHandle(pending, lambda: (received, sizes.tolist()), (array,))
        assert isinstance(request, AllReduce), "arrays of the host are never copied to it"
        reduced = np.empty_like(array)
        operation = MPI.MAX if request.op == "max" else MPI.SUM
        pending = self.communicator.Iallreduce(array, reduced, operation)
        return MPIHandle(pending, lambda: reduced, (array,))

    def close(self) -> None:
        """Free the communicator; call it on all ranks."""
        self.communicator.Free()
