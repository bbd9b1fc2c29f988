"""Messages over Horovod, which has no point-to-point messages: an alltoall in a process set of the two ranks.

Collectives are matched by name, which holds sender, receiver, tag and number, so the order does not matter.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.pipeline.message import bytes_of
from hvd_qsgd.pipeline.transport import ACTIVATION, CONTROL, GRACE_S, GRADIENT, PAUSE, StageError, Transport

#: What a failing rank sends in place of a message begins with this.
FAILED = b"HQPX"


def pipeline_links(stages: int) -> list[hvd.ProcessSet]:
    """A process set for each pair of neighbours in pipelines of so many stages.

    All ranks call it after ``hvd.init()``, with HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment.
    """
    return [process_set_of([rank, rank + 1]) for rank in range(hvd.size() - 1) if (rank + 1) % stages]


def stage_sets(stages: int) -> list[hvd.ProcessSet]:
    """For each stage the process set of its replicas, within which they average gradients.

    All ranks call it, as :func:`pipeline_links`.
    """
    return [process_set_of(list(range(stage, hvd.size(), stages))) for stage in range(stages)]


def process_set_of(ranks: list[int]) -> hvd.ProcessSet:
    """A new process set, or Horovod's own if it is that of all ranks, which cannot be made twice."""
    if len(ranks) == hvd.size():
        return hvd.global_process_set
    return hvd.add_process_set(ranks)


class HorovodTransport(Transport):
    """Neighbours in a Horovod job. Messages of a stage on a GPU pass through host memory.

    Args:
        links: process sets of two ranks each; see :func:`pipeline_links`.
        timeout: seconds to wait for a message.
    """

    def __init__(self, links: list[hvd.ProcessSet], timeout: float = 600.0) -> None:
        self.rank, self.ranks = hvd.rank(), hvd.size()
        self.timeout = timeout
        self._links = {peer: link for link in links if self.rank in link.ranks for peer in link.ranks}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()
        self._outgoing: list[int] = []

    def send(self, peer: int, tag: int, message: torch.Tensor) -> None:
        self._outgoing.append(self._start(self.rank, peer, tag, self._sent, message.cpu()))

    def receive(self, peer: int, tag: int) -> torch.Tensor:
        handle = self._start(peer, self.rank, tag, self._received, torch.empty(0, dtype=torch.uint8, device="cpu"))
        self._await(lambda: self._look() and hvd.poll(handle), f"for message {tag} from rank {peer}")
        return self._finish(handle)

    def flush(self) -> None:
        self._await(lambda: self._look() and not self._outgoing, "for its messages to be received")

    def abort(self, cause: str) -> None:
        # Neighbours wait for the next message of some tag, or have sent one that nobody will answer; who is told
        # tells its other neighbour. The rank that leaves first shuts Horovod down for all, so all wait for all.
        text = torch.frombuffer(bytearray(FAILED + cause.encode()), dtype=torch.uint8)
        with contextlib.suppress(StageError):
            for peer in self._links:
                for tag in (ACTIVATION, GRADIENT, CONTROL) if peer != self.rank else ():
                    self._start(self.rank, peer, tag, self._sent, text)
                    self._start(peer, self.rank, tag, self._received, text)
            told = hvd.allreduce_async(torch.ones(1, device="cpu"), name="hvd_qsgd.pipeline.abort")
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and not hvd.poll(told):
                time.sleep(PAUSE)

    def close(self) -> None:
        # A rank that leaves shuts Horovod down for all.
        self.flush()
        hvd.barrier()

    def _start(self, source: int, target: int, tag: int, counter: Counter[tuple[int, int]], data: torch.Tensor) -> int:
        peer = target if source == self.rank else source
        link = self._links.get(peer)
        if link is None:
            raise ExchangeError(
                f"Rank {self.rank} has no process set with rank {peer}: pass those of pipeline_links()."
            )
        number = counter[peer, tag]
        counter[peer, tag] += 1
        splits = torch.tensor(
            [len(data) if rank == peer else 0 for rank in link.ranks], dtype=torch.int32, device="cpu"
        )
        name = f"hvd_qsgd.pipeline.{source}.{target}.{tag}.{number}"
        try:
            return int(hvd.alltoall_async(data, splits, name=name, process_set=link))
        except ValueError as error:
            # Process sets are gone once Horovod has been shut down.
            raise StageError(f"Another rank has ended: {error}") from error

    def _look(self) -> bool:
        """Drop what has been sent. True, for use in conditions."""
        for handle in [handle for handle in self._outgoing if hvd.poll(handle)]:
            self._outgoing.remove(handle)
            self._finish(handle)
        return True

    def _finish(self, handle: int) -> torch.Tensor:
        try:
            message: torch.Tensor = hvd.synchronize(handle)[0]
        except HorovodInternalError as error:
            raise StageError(f"Another rank has ended: {error}") from error
        if bytes_of(message[: len(FAILED)]) == FAILED:
            raise StageError(bytes_of(message[len(FAILED) :]).decode(errors="replace"))
        return message
