"""Messages over mpi4py: non-blocking, from and to the memory of tensors, nothing pickled."""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict, deque

import torch
from mpi4py import MPI

from hvd_qsgd.pipeline.transport import CONTROL, GRACE_S, PAUSE, StageError, Transport

#: Tag of the message that tells why a rank has failed. Others count from 0.
ABORT_TAG = 32767
HOST = torch.device("cpu")


class MPITransport(Transport):
    """The ranks of a communicator, which is duplicated so that other traffic cannot be mistaken for ours.

    Whatever arrives while a rank waits is taken in, whoever sent it, so that no sender waits for
    a receiver that waits for something else.

    Messages of a stage on a GPU are in its memory. An MPI that can reach there ("CUDA-aware") is given them as
    they are, and receives into it; otherwise they pass through page-locked host memory. Ranks may differ in this.

    Args:
        communicator: default is MPI.COMM_WORLD.
        timeout: seconds to wait for a message.
        device_memory: whether MPI reads and writes the memory of GPUs; default is what it says of itself.
    """

    def __init__(
        self,
        communicator: MPI.Intracomm | None = None,
        timeout: float = 600.0,
        device_memory: bool | None = None,
    ) -> None:
        self.communicator = (communicator or MPI.COMM_WORLD).Dup()
        self.rank = self.communicator.Get_rank()
        self.ranks = self.communicator.Get_size()
        self.timeout = timeout
        self.device_memory = reaches_device_memory() if device_memory is None else device_memory
        #: Requests with the memory that MPI still reads from.
        self._outgoing: list[tuple[MPI.Request, torch.Tensor]] = []
        self._incoming: deque[tuple[MPI.Request, int, int, torch.Tensor]] = deque()
        self._arrived: defaultdict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)

    def send(self, peer: int, tag: int, message: torch.Tensor) -> None:
        message = self._readable(message)
        self._outgoing.append((self.communicator.Isend([message, MPI.BYTE], peer, tag), message))
        self._progress()

    def receive(self, peer: int, tag: int) -> torch.Tensor:
        queue = self._arrived[peer, tag]
        self._await(lambda: self._progress() and bool(queue), f"for message {tag} from rank {peer}")
        return queue.popleft()

    def flush(self) -> None:
        self._await(lambda: self._progress() and not self._outgoing, "for its messages to be received")

    def abort(self, cause: str) -> None:
        text = cause.encode()
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
            source, tag, size = status.Get_source(), status.Get_tag(), status.Get_count(MPI.BYTE)
            if tag == ABORT_TAG:
                text = bytearray(size)
                found.Recv(text)
                raise StageError(text.decode(errors="replace"))
            memory = self._writable(size, tag)
            self._incoming.append((found.Irecv([memory, MPI.BYTE]), source, tag, memory))
        self._outgoing = [(request, memory) for request, memory in self._outgoing if not request.Test()]
        # In the order of arrival: a short message must not overtake a long one.
        while self._incoming and self._incoming[0][0].Test():
            _, source, tag, memory = self._incoming.popleft()
            self._arrived[source, tag].append(memory)
        return True

    def _readable(self, message: torch.Tensor) -> torch.Tensor:
        """The message where MPI can read it, and complete."""
        if message.device.type == "cpu":
            return message
        if not self.device_memory:
            message, origin = allocate(message.numel(), HOST, page_locked=True), message
            message.copy_(origin, non_blocking=True)
        # MPI knows nothing of streams.
        torch.cuda.current_stream(self.device).synchronize()
        return message

    def _writable(self, size: int, tag: int) -> torch.Tensor:
        """Memory that MPI can write to and nobody else uses."""
        if self.device.type == "cpu" or tag == CONTROL:
            return allocate(size, HOST)
        if not self.device_memory:
            return allocate(size, HOST, page_locked=True)
        memory = allocate(size, self.device)
        # Kernels that are still to run may use it under its last name.
        torch.cuda.current_stream(self.device).synchronize()
        return memory


def allocate(size: int, device: torch.device, page_locked: bool = False) -> torch.Tensor:
    """Memory of ``size`` bytes. GPUs copy from and to page-locked memory of the host by themselves."""
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=page_locked)


def reaches_device_memory() -> bool:
    """Whether MPI says that it reads and writes the memory of GPUs of the kind that torch was built for.

    Open MPI, MPICH and MVAPICH answer this question; of an MPI that does not, the answer is no.
    """
    name = "MPIX_Query_rocm_support" if torch.version.hip else "MPIX_Query_cuda_support"
    # The symbols of mpi4py's extension include those of the MPI that it is linked with.
    query = getattr(ctypes.CDLL(MPI.__file__), name, None)
    return query is not None and bool(query())
