"""The parts that exchanges are made of.

An exchange is a generator: it yields the collective it wants (:class:`AllGather`,
:class:`AllToAll`, :class:`AllReduce`) and is resumed with the outcome. It is written once
and runs over Horovod, over mpi4py, or with all ranks in one process
(:mod:`hvd_qsgd.collectives`), and any number of exchanges can be under way at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.random_words import key_of

#: Payloads start at multiples of this many bytes inside a message.
ALIGNMENT = 4


@dataclass
class AllGather:
    """Gather each rank's bytes; the outcome is one array with all of them in rank order."""

    name: str
    array: Any


@dataclass
class AllToAll:
    """Send ``splits[r]`` bytes to rank ``r``; the outcome is (array in rank order, sizes received)."""

    name: str
    array: Any
    splits: list[int]


@dataclass
class AllReduce:
    """Reduce int32 words, or add up float32 ones, in place with "sum" or "max"; the outcome is the array."""

    name: str
    array: Any
    op: str


Request = Union[AllGather, AllToAll, AllReduce]


def phase_of(request: Request) -> str:
    """What a request is called in :attr:`Exchange.phases`."""
    return request.op if isinstance(request, AllReduce) else type(request).__name__.lower()


Steps = Generator[Request, Any, None]


#: Makes an uninitialized flat array of a length and a dtype, of the job's backend and device.
Empty = Callable[[int, str], Any]


@dataclass(frozen=True)
class Work:
    """What an exchange does on each rank, for predictions (:mod:`hvd_qsgd.cost`)."""

    #: Bytes that a rank sends, by collective ("allgather", "alltoall", "allreduce").
    sent: Mapping[str, float]
    #: Elements that a rank encodes, decodes, and puts into lanes.
    encoded: float = 0
    decoded: float = 0
    lanes: float = 0
    #: Collectives beyond those in ``sent``.
    agreements: int = 0


@dataclass
class Piece:
    """A run of consecutive elements of one tensor.

    Args:
        name: of the tensor.
        x: what this rank contributes, flat float32.
        out: receives the mean over ranks, flat float32; may be the memory of ``x`` unless
            ``keep_error``.
        stream, step: of the random words (see :mod:`hvd_qsgd.random_words`).
        first: position of ``x[0]`` in its tensor.
        keep_error: leave in ``x`` what this rank could not send: the new residual.
        shape: of the tensor, if the piece is all of it.
        memory: what the codec remembers of the tensor on this rank (see ``Kernels.with_memory``).
    """

    name: str
    x: Any
    out: Any
    stream: int = 0
    step: int = 0
    first: int = 0
    keep_error: bool = False
    shape: tuple[int, ...] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    #: Set by the exchange: the size of this rank's payload of the piece.
    payload_bytes: int = field(default=0, init=False)

    def key(self, phase: int = 0) -> int:
        return key_of(self.stream, self.step, phase)


@dataclass
class Segment:
    """The part of a piece that lies in one shard."""

    piece: Piece
    start: int
    stop: int

    @property
    def first(self) -> int:
        return self.piece.first + self.start

    def of(self, array: Any) -> Any:
        return array[self.start : self.stop]


@dataclass
class Job:
    """One exchange: some pieces that travel together between the ranks of one group."""

    name: str
    pieces: Sequence[Piece]
    kernels: Kernels
    rank: int
    ranks: int
    empty: Empty
    #: Set by the exchange: what this rank sends when collectives run as rings.
    wire_bytes: float = field(default=0, init=False)

    @property
    def payload_bytes(self) -> int:
        return sum(piece.payload_bytes for piece in self.pieces)

    @property
    def codec(self) -> Codec:
        return self.kernels.codec

    def fingerprint(self, exchange: str) -> int:
        """31 bits that differ when two ranks do not mean the same exchange."""
        shape = tuple((piece.name, piece.first, len(piece.x)) for piece in self.pieces)
        return _fingerprint(exchange, self.codec, shape, self.ranks)

    def disagreement(self, detail: str) -> ExchangeError:
        return ExchangeError(
            f"Rank {self.rank}, exchange {self.name!r}: {detail}. All ranks must run the same model with the same "
            f"compressor settings; here they are {self.codec.config()}."
        )


# The same in every step.
@functools.lru_cache(maxsize=4096)
def _fingerprint(exchange: str, codec: Codec, shape: tuple[tuple[str, int, int], ...], ranks: int) -> int:
    text = json.dumps([exchange, codec.version, codec.config(), shape, ranks], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def write_header(message: Any, value: int) -> None:
    """Put a little-endian uint32 at the start of a message of any backend's bytes."""
    for i in range(4):
        message[i] = (value >> (8 * i)) & 0xFF


def read_words(message: Any, count: int) -> list[int]:
    """The first ``count`` little-endian uint32 of a message of any backend's bytes."""
    head = message[: 4 * count]
    if hasattr(head, "cpu"):
        head = head.cpu()
    return [int(word) for word in np.frombuffer(np.asarray(head).tobytes(), "<u4")]


def ring_bytes(size: int, ranks: int) -> float:
    """What a rank sends for an allreduce of ``size`` bytes that runs as a ring."""
    return 2 * (ranks - 1) / ranks * size


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def shards_of(job: Job) -> list[list[Segment]]:
    """Cut the pieces, laid end to end, into one shard a rank.

    Cuts fall between buckets, and the numbers of buckets of two shards differ by one at
    most.
    """
    unit = job.codec.granularity
    units = [-(-len(piece.x) // unit) for piece in job.pieces]
    total = sum(units)
    shards: list[list[Segment]] = []
    for rank in range(job.ranks):
        low, high = total * rank // job.ranks, total * (rank + 1) // job.ranks
        segments, before = [], 0
        for piece, count in zip(job.pieces, units):
            start = max(low - before, 0) * unit
            stop = min((high - before) * unit, len(piece.x))
            before += count
            if start < stop:
                segments.append(Segment(piece, start, stop))
        shards.append(segments)
    return shards


@dataclass(frozen=True)
class Exchange:
    """An exchange as the registry lists it: call it with a job."""

    steps: Callable[[Job], Steps]
    #: Of a codec, a number of elements and a number of ranks.
    work: Callable[[Codec, int, int], Work]
    #: The collectives that it yields, in order, for frameworks that build their graph beforehand: "allgather",
    #: "alltoall", "max" and "sum" of int32 words. Empty where that does not describe it.
    phases: tuple[str, ...] = ()

    def __call__(self, job: Job) -> Steps:
        return self.steps(job)
