"""scatter_gather: each rank averages one shard and sends the encoded mean to all others.

About two payloads a rank, whatever the number of ranks, at the price of a second rounding.
Known as scatter-reduce-allgather in CGX (Markov et al., Middleware 2022, arXiv 2111.08617).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from operator import gt
from typing import Any

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.exchanges.base import (
    AllGather,
    AllToAll,
    Exchange,
    Job,
    Request,
    Segment,
    Steps,
    Work,
    aligned,
    other_message,
    read_words,
    shards_of,
    write_words,
)


def scatter_gather(job: Job) -> Steps:
    """A shard's message goes from each rank to its owner, and from its owner with the mean to all.

    The owner of a shard uses its own decoded payload like everybody else, so that all ranks
    hold the same bits.
    """
    messages, shards = ShardMessages(job), shards_of(job)
    own = shards[job.rank]

    def encode(segment: Segment, room: Any) -> int:
        piece, x = segment.piece, segment.of(segment.piece.x)
        size = job.kernels.encode_into(x, room, piece.key(), segment.first)
        if piece.keep_error:
            job.kernels.decode_into(room[:size], x, "subtract")
        piece.payload_bytes += size
        return size

    message = job.empty(sum(messages.room(segments) for segments in shards), "uint8")
    splits: list[int] = []
    for segments in shards:
        splits.append(messages.write(segments, message[sum(splits) :], encode))

    received, received_sizes = yield AllToAll(f"{job.name}.alltoall", message[: sum(splits)], splits)

    at, payloads = 0, []
    for rank, size in enumerate(received_sizes):
        spans, end = yield from messages.read(own, received, at, rank)
        at += size
        if end != at:
            raise job.disagreement(f"rank {rank} sent {size} bytes where {end - at + size} were expected")
        payloads.append(spans)

    of_segments = zip(*payloads)

    def average(segment: Segment, room: Any) -> int:
        piece, mean = segment.piece, segment.of(segment.piece.out)
        if mean.dtype.itemsize < 4:
            # The mean is rounded to codes, not first to the type of the gradient.
            mean = job.empty(len(mean), "float32")
        job.kernels.average_into(received, next(of_segments), mean)
        size = job.kernels.encode_into(mean, room, piece.key(phase=1), segment.first)
        if piece.keep_error:
            # What the second rounding loses, this rank adds to its next gradient.
            job.kernels.decode_into(room[:size], mean, "subtract")
            mean *= job.ranks
            residual = segment.of(piece.x)
            residual += mean
        return size

    # In the memory of what has been sent by now, of which this rank's shard was a part.
    reply = message[: messages.write(own, message, average)]

    gathered = yield AllGather(f"{job.name}.allgather", reply)

    job.wire_bytes += sum(splits) - splits[job.rank] + len(gathered) - len(reply)
    at = 0
    for rank, segments in enumerate(shards):
        spans, at = yield from messages.read(segments, gathered, at, rank)
        for segment, (start, stop) in zip(segments, spans):
            job.kernels.decode_into(gathered[start:stop], segment.of(segment.piece.out), "set")
    if at != len(gathered):
        raise job.disagreement(f"{len(gathered)} bytes of means came where {at} were expected")


class ShardMessages:
    """Messages that carry a shard: fingerprint, the sizes of its payloads if they vary, the payloads."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.fingerprint = job.fingerprint("scatter_gather")

    def room(self, segments: list[Segment]) -> int:
        """Bytes that a message takes at most; those that it takes if the sizes do not vary."""
        return self._head(segments) + sum(aligned(self._most(segment)) for segment in segments)

    def write(self, segments: list[Segment], message: Any, encode: Callable[[Segment, Any], int]) -> int:
        """Fill a message with what ``encode`` makes of each segment; returns its length."""
        at = self._head(segments)
        words = [self.fingerprint]
        for segment in segments:
            size = encode(segment, message[at : at + self._most(segment)])
            if self.job.codec.variable_size:
                words.append(size)
            at += aligned(size)
        write_words(message, words)
        return at

    def read(
        self, segments: list[Segment], message: Any, at: int, rank: int
    ) -> Generator[Request, Any, tuple[list[tuple[int, int]], int]]:
        """Where the payloads stand in the message of a rank that begins at ``at``, and where it ends.

        Raises:
            ExchangeError: it is another message than was expected.
        """
        detail = other_message(rank)
        head = message[at : at + self._head(segments)]
        most = [self._most(segment) for segment in segments]
        sizes = most
        if self.job.codec.variable_size:
            words = yield from read_words(head, f"{self.job.name}.{rank}")
            sizes = words[1:]
            if words[:1] != [self.fingerprint] or len(sizes) != len(most) or any(map(gt, sizes, most)):
                raise self.job.disagreement(detail)
        else:
            self.job.expect(head, [self.fingerprint], detail)
        at += self._head(segments)
        spans = []
        for size in sizes:
            spans.append((at, at + size))
            at += aligned(size)
        if at > len(message):
            raise self.job.disagreement(detail)
        return spans, at

    def _head(self, segments: list[Segment]) -> int:
        return 4 * (1 + len(segments) * self.job.codec.variable_size)

    def _most(self, segment: Segment) -> int:
        return self.job.codec.payload_size(segment.stop - segment.start)


def work(codec: Codec, length: int, ranks: int) -> Work:
    sent = (ranks - 1) / ranks * codec.payload_size(length)
    return Work({"alltoall": sent, "allgather": sent}, encoded=length * (1 + 1 / ranks), decoded=2 * length)


SCATTER_GATHER = Exchange(scatter_gather, work, ("alltoall", "allgather"))
