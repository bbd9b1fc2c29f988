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
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.codecs.random_words import key_of
from hvd_qsgd.codecs.readback import Looks, together
from hvd_qsgd.errors import ExchangeError

#: Payloads start at multiples of this many bytes inside a message.
ALIGNMENT = 4
#: Of a fingerprint that is added up with the words of all ranks.
CHECK_BITS = 12


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


@dataclass
class ToHost:
    """Copy the bytes of a device's array to the host, which waits for no other work; the outcome is a NumPy array.

    Arrays of the host need none, and exchanges ask for none.
    """

    name: str
    array: Any


Request = Union[AllGather, AllToAll, AllReduce, ToHost]


def phase_of(request: Request) -> str:
    """What a request is called in :attr:`Exchange.phases`."""
    if not isinstance(request, AllReduce):
        return type(request).__name__.lower()
    return request.op if "int" in str(request.array.dtype) else f"{request.op}_float"


T = TypeVar("T")
Steps = Generator[Request, Any, None]


#: Makes an uninitialized flat array of a length and a dtype, of the job's backend and device.
Empty = Callable[[int, str], Any]


@dataclass(frozen=True)
class Work:
    """What an exchange does on each rank, for predictions (:mod:`hvd_qsgd.tuning.cost`)."""

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
        x: what this rank contributes, flat float32; or of a type that ``Kernels.halves`` allows, unless
            ``keep_error``.
        out: receives the mean over ranks, flat and of the type of ``x``; may be the memory of ``x`` unless
            ``keep_error``.
        stream, step: of the random words (see :mod:`hvd_qsgd.codecs.random_words`).
        first: position of ``x[0]`` in its tensor.
        keep_error: leave in ``x`` what this rank could not send: the new residual.
        shape: of the tensor, if the piece is all of it.
        dtype: of the tensor, which that of ``x`` need not be.
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
    dtype: str = "float32"
    #: Set by the exchange: the size of this rank's payload of the piece.
    payload_bytes: int = field(default=0, init=False)
    #: Set with ``keep_error`` where ``out`` is on a device: whether it holds neither NaN nor an infinity.
    finite: bool | None = field(default=None, init=False)

    def key(self, phase: int = 0) -> int:
        """Of the random words: phase 0 encodes what this rank contributes, 1 the mean."""
        return key_of(self.stream, self.step, phase)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What must be equal on all ranks: the same elements of the same tensor."""
        return (self.name, self.first, len(self.x), self.shape, self.dtype)


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
    """One exchange: some pieces that travel together between the ranks of one group.

    Args:
        name: of the exchange, the same on all ranks; its collectives are named after it.
        pieces: in the same order on all ranks.
        kernels: of the codec, for the arrays of the pieces.
        rank, ranks: this one in the group, and how many there are.
        empty: makes uninitialized arrays like those of the pieces.
    """

    name: str
    pieces: Sequence[Piece]
    kernels: Kernels
    rank: int
    ranks: int
    empty: Empty
    #: Set by the exchange: what this rank sends when collectives run as rings.
    wire_bytes: float = field(default=0, init=False)
    #: Bytes on a device, those they must be, and what is wrong if they are not.
    _expected: list[tuple[Any, bytes, str]] = field(default_factory=list, init=False)

    @property
    def payload_bytes(self) -> int:
        """Of this rank, once it has encoded."""
        return sum(piece.payload_bytes for piece in self.pieces)

    @property
    def codec(self) -> Codec:
        return self.kernels.codec

    def fingerprint(self, exchange: str) -> int:
        """31 bits that differ when two ranks do not mean the same exchange."""
        return _fingerprint(exchange, self.codec, tuple(piece.identity for piece in self.pieces), self.ranks)

    def expect(self, found: Any, words: Sequence[int], detail: str) -> None:
        """Raise ExchangeError unless the bytes of ``found`` are those of little-endian uint32 words.

        What is on a device is only looked at by :meth:`finish`.
        """
        expected = little_endian(words)
        if is_torch(found):
            self._expected.append((found, expected, detail))
        elif found.tobytes() != expected:
            raise self.disagreement(detail)

    def finish(self) -> Steps:
        """The one look that the host takes at what an exchange left on a device, before anybody uses it.

        Raises:
            ExchangeError: other ranks sent something else than was expected of them.
        """
        kept = [piece for piece in self.pieces if piece.keep_error and is_torch(piece.out)]
        parts = [*(found for found, _, _ in self._expected), *(finite_flag(piece.out) for piece in kept)]
        if not parts:
            return
        seen = yield from look(self, parts)
        for (_, expected, detail), found in zip(self._expected, seen):
            if found.tobytes() != expected:
                raise self.disagreement(detail)
        for piece, flag in zip(kept, seen[len(self._expected) :]):
            piece.finite = bool(flag[0])

    def check_bits(self, exchange: str) -> int:
        """Low bits of the fingerprint, which differ as well when two ranks draw other common random words.

        Their sum over 4096 ranks is exact in float32. A rank draws other words if it has another seed, or another
        number of steps behind it.
        """
        keys = functools.reduce(operator.xor, (piece.key() for piece in self.pieces), 0)
        return (self.fingerprint(exchange) ^ keys) & ((1 << CHECK_BITS) - 1)

    def other_sums(self) -> ExchangeError:
        """What is raised where the check bits of the ranks do not add up."""
        return self.disagreement(
            "the ranks do not agree on what they add up: they have other settings, another seed, or other steps behind "
            "them, as after hvd.join() or with checkpoints of different steps, where compressor.reset() on all ranks "
            "helps"
        )

    def disagreement(self, detail: str) -> ExchangeError:
        """What is raised where another rank does not mean the same exchange."""
        return ExchangeError(
            f"Rank {self.rank}, exchange {self.name!r}: {detail}. All ranks must run the same model with the same "
            f"compressor settings; here they are {self.codec.config()}."
        )


# The same in every step.
@functools.lru_cache(maxsize=4096)
def _fingerprint(exchange: str, codec: Codec, pieces: tuple[tuple[Any, ...], ...], ranks: int) -> int:
    text = json.dumps([exchange, codec.version, codec.config(), pieces, ranks], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def little_endian(words: Sequence[int]) -> bytes:
    """Words below 2^32 as they stand in messages."""
    return np.array(words, "<u4").tobytes()


def is_torch(array: Any) -> bool:
    """Whether it is a tensor of torch, which may be on a device that the host should not wait for."""
    return hasattr(array, "data_ptr")


def as_bytes(array: Any) -> Any:
    """The memory of an array of any backend, uint8."""
    if not is_torch(array):
        return array.view(np.uint8)
    # An empty tensor that came from NumPy has stride 0, and view refuses it.
    return array.view(_torch().uint8) if len(array) else array.new_empty(0, dtype=_torch().uint8)


def write_words(message: Any, words: Sequence[int]) -> None:
    """Put little-endian uint32 words at the start of a message of any backend's bytes."""
    data = little_endian(words)
    message[: len(data)] = sent(message, data) if is_torch(message) else np.frombuffer(data, np.uint8)


def words_of(data: Any) -> list[int]:
    """The inverse of :func:`little_endian`, of an array of the host's bytes, which may be cut short."""
    return [int(word) for word in np.frombuffer(data.tobytes()[: len(data) // 4 * 4], "<u4")]


def read_words(message: Any, name: str) -> Generator[Request, Any, list[int]]:
    """The little-endian uint32 words of a message of any backend's bytes."""
    return words_of((yield ToHost(name, message)) if is_torch(message) else message)


def read_heads(messages: Any, lengths: Sequence[int], name: str) -> Generator[Request, Any, list[list[int]]]:
    """The words at the start of each of some messages that lie end to end.

    A message is a head of so many bytes (``lengths``), whose words from the second on are the sizes of the payloads
    that follow. So where a message begins is said by those before it, and on a device it is the device that goes from
    one to the next: the host looks once. What cannot be right is cut short, or other bytes of ``messages``.
    """
    if not is_torch(messages):
        found, at = [], 0
        for length in lengths:
            found.append(words_of(messages[at : at + length]))
            at += length + sum(map(aligned, found[-1][1:]))
        return found
    torch = _torch()
    heads, start = [], torch.zeros(1, dtype=torch.int64, device=messages.device)
    for length in lengths:
        places = start + torch.arange(length, device=messages.device)
        heads.append(messages[places.clamp(max=len(messages) - 1)])
        sizes = heads[-1][4:].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        start = start + length + aligned(sizes).sum()
    seen = yield ToHost(name, torch.cat(heads))
    return [words_of(head) for head in np.split(seen, np.cumsum(lengths)[:-1])]


def look(job: Job, arrays: Sequence[Any]) -> Generator[Request, Any, list[Any]]:
    """Some flat arrays of a job's backend as the host sees them; those of a device come with one copy."""
    if not arrays or not is_torch(arrays[0]):
        return list(arrays)
    data = yield ToHost(f"{job.name}.look", end_to_end(arrays))
    parts = np.split(data, np.cumsum([array.nbytes for array in arrays])[:-1])
    return [part.view(str(array.dtype).removeprefix("torch.")) for array, part in zip(arrays, parts)]


def prepared(job: Job, several: Iterable[Looks[T]]) -> Generator[Request, Any, list[T]]:
    """What ``prepare_*`` of kernels return, with one copy to the host for all that several look at at a time."""
    looks = together(several)
    seen: Any = None
    while True:
        try:
            arrays = looks.send(seen)
        except StopIteration as stop:
            value: list[T] = stop.value
            return value
        seen = yield from look(job, arrays)


def sent(like: Any, data: bytes) -> Any:
    """Bytes on the device of a tensor, for which nobody waits."""
    from hvd_qsgd.kernels.torch.transfer import to_device

    return to_device(data, like.device)


def end_to_end(parts: Sequence[Any]) -> Any:
    """Arrays of a device as the bytes of one."""
    return _torch().cat([as_bytes(part) for part in parts])


def finite_flag(values: Any) -> Any:
    """One boolean on the device of some values: 1 if all are finite."""
    return (abs(values) < float("inf")).all().view(1)


def all_finite(job: Job, arrays: Sequence[Any]) -> Generator[Request, Any, list[bool]]:
    """Which of some arrays hold neither NaN nor an infinity; one copy to the host for all of them."""
    if not arrays or not is_torch(arrays[0]):
        return [job.kernels.all_finite(array) for array in arrays]
    flags = yield from look(job, [finite_flag(array) for array in arrays])
    return [bool(flag[0]) for flag in flags]


def _torch() -> Any:
    import torch

    return torch


def other_message(rank: int) -> str:
    """What is wrong with a message that is not the expected one."""
    # Horovod refuses a gather with a rank that has joined, but not if its cache knows the gather.
    return (
        f"rank {rank} sent something else than was expected, or has called hvd.join(), which only "
        f'exchange="allreduce" can go on with'
    )


def ring_bytes(size: int, ranks: int) -> float:
    """What a rank sends for an allreduce of ``size`` bytes that runs as a ring."""
    return 2 * (ranks - 1) / ranks * size


def aligned(size: Any) -> Any:
    """Bytes that a payload takes in a message; of a number, or of each in a tensor."""
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
    """An exchange as the registry lists it, under the name of its generator function: call it with a job."""

    steps: Callable[[Job], Steps]
    #: Of a codec, a number of elements and a number of ranks.
    work: Callable[[Codec, int, int], Work]
    #: Whether a codec offers what the exchange needs of it.
    carries: Callable[[Codec], bool]
    #: The collectives that it yields, in order, for frameworks that build their graph beforehand: "allgather",
    #: "alltoall", "max" and "sum" of int32 words, "sum_float" of float32 ones. Empty where that does not describe it.
    phases: tuple[str, ...] = ()
    #: Of the exchanges that carry a codec, that with the highest preference comes first; those of this package
    #: have 1 to 4.
    preference: int = 0

    @property
    def name(self) -> str:
        return self.steps.__name__

    def __call__(self, job: Job) -> Steps:
        return self.steps(job)
