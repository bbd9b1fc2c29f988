"""Messages over mpi4py: non-blocking, from and to NumPy buffers, nothing pickled."""

from __future__ import annotations

import time
from collections import defaultdict, deque

import numpy as np
from mpi4py import MPI

from hvd_qsgd.pipeline.transport import GRACE_S, PAUSE, StageError, Transport

#: Tag of the message that tells why a rank has failed. Others count from 0.
ABORT_TAG = 32767


class MPITransport(Transport):
    """The ranks of a communicator, which is duplicated so that other traffic cannot be mistaken for ours.

    Whatever arrives while a rank waits is taken in, whoever sent it, so that no sender waits for
    a receiver that waits for something else.

    Args:
        communicator: default is MPI.COMM_WORLD.
        timeout: seconds to wait for a message.
    """

    def __init__(self, communicator: MPI.Intracomm | None = None, timeout: float = 600.0) -> None:
        self.communicator = (communicator or MPI.COMM_WORLD).Dup()
        self.rank = self.communicator.Get_rank()
        self.ranks = self.communicator.Get_size()
        self.timeout = timeout
        #: Requests with the memory that MPI still reads from.
        self._outgoing: list[tuple[MPI.Request, np.ndarray]] = []
        self._incoming: deque[tuple[MPI.Request, int, int, np.ndarray]] = deque()
        self._arrived: defaultdict[tuple[int, int], deque[np.ndarray]] = defaultdict(deque)

    def send(self, peer: int, tag: int, message: np.ndarray) -> None:
        self._outgoing.append((self.communicator.Isend(message, peer, tag), message))
        self._progress()

    def receive(self, peer: int, tag: int) -> np.ndarray:
        queue = self._arrived[peer, tag]
        self._await(lambda: self._progress() and bool(queue), f"for message {tag} from rank {peer}")
        return queue.popleft()

    def flush(self) -> None:
        self._await(lambda: self._progress() and not self._outgoing, "for its messages to be received")

    def abort(self, cause: str) -> None:
        text = np.frombuffer(cause.encode(), np.uint8)
        requests = [self.communicator.Isend(text, peer, ABORT_TAG) for peer in range(self.ranks) if peer != self.rank]
        deadline = time.monotonic() + GRACE_S
        while not MPI.Request.Testall(requests) and time.monotonic() < deadline:
            time.sleep(PAUSE)

    def close(self) -> None:
        self.flush()
        barrier = self.communicator.Ibarrier()
        self._await(lambda: self._progress() and barrier.Test(), "for all ranks to end")

    def _progress(self) -> bool:
        """Let everything under way move on. True, for use in conditions."""
        status = MPI.Status()
        while (found := self.communicator.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
            source, tag = status.Get_source(), status.Get_tag()
            buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            if tag == ABORT_TAG:
                found.Recv(buffer)
                raise StageError(buffer.tobytes().decode(errors="replace"))
            self._incoming.append((found.Irecv(buffer), source, tag, buffer))
        self._outgoing = [(request, memory) for request, memory in self._outgoing if not request.Test()]
        # In the order of arrival: a short message must not overtake a long one.
        while self._incoming and self._incoming[0][0].Test():
            _, source, tag, buffer = self._incoming.popleft()
            self._arrived[source, tag].append(buffer)
        return True
