"""scatter_gather: each rank averages one shard and sends the encoded mean to all others.

About two payloads a rank, whatever the number of ranks, at the price of a second rounding.
Known as scatter-reduce-allgather in CGX (Markov et al., Middleware 2022, arXiv 2111.08617).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
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
    prepared,
    read_heads,
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
    segments = [segment for shard in shards for segment in shard]
    writes = yield from prepared(
        job,
        (job.kernels.prepare_encode(s.of(s.piece.x), s.piece.key(), s.first, s.piece.keep_error) for s in segments),
    )
    message = job.empty(sum(messages.room(shard) for shard in shards), "uint8")
    left = iter(writes)
    splits: list[int] = []
    for shard in shards:
        sizes, end = messages.write(shard, message[sum(splits) :], left)
        splits.append(end)
        for segment, size in zip(shard, sizes):
            segment.piece.payload_bytes += size

    received, received_sizes = yield AllToAll(f"{job.name}.alltoall", message[: sum(splits)], splits)

    heads = yield from messages.heads([own] * job.ranks, received)
    at, payloads = 0, []
    for rank, size in enumerate(received_sizes):
        spans, end = messages.spans(own, received, at, rank, heads[rank])
        at += size
        if end != at:
            raise job.disagreement(f"rank {rank} sent {size} bytes where {end - at + size} were expected")
        payloads.append(spans)
    averages = yield from prepared(
        job, (job.kernels.prepare_average(received, of_one, s.stop - s.start) for s, of_one in zip(own, zip(*payloads)))
    )
    means = []
    for segment, average in zip(own, averages):
        mean = segment.of(segment.piece.out)
        if mean.dtype.itemsize < 4:
            # The mean is rounded to codes, not first to the type of the gradient.
            mean = job.empty(len(mean), "float32")
        average(mean)
        means.append(mean)
    writes = yield from prepared(
        job,
        (
            job.kernels.prepare_encode(mean, s.piece.key(phase=1), s.first, s.piece.keep_error)
            for s, mean in zip(own, means)
        ),
    )
    # In the memory of what has been sent by now, of which this rank's shard was a part.
    reply = message[: messages.write(own, message, iter(writes))[1]]
    for segment, mean in zip(own, means):
        if segment.piece.keep_error:
            # What the second rounding loses, this rank adds to its next gradient.
            mean *= job.ranks
            residual = segment.of(segment.piece.x)
            residual += mean

    gathered = yield AllGather(f"{job.name}.allgather", reply)

    job.wire_bytes += sum(splits) - splits[job.rank] + len(gathered) - len(reply)
    heads = yield from messages.heads(shards, gathered)
    at, payloads = 0, []
    for rank, shard in enumerate(shards):
        spans, at = messages.spans(shard, gathered, at, rank, heads[rank])
        payloads += [gathered[start:stop] for start, stop in spans]
    if at != len(gathered):
        raise job.disagreement(f"{len(gathered)} bytes of means came where {at} were expected")
    decodes = yield from prepared(
        job, (job.kernels.prepare_decode(payload, s.stop - s.start) for s, payload in zip(segments, payloads))
    )
    for segment, decode in zip(segments, decodes):
        decode(segment.of(segment.piece.out), "set")


class ShardMessages:
    """Messages that carry a shard: fingerprint, the sizes of its payloads if they vary, the payloads."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.fingerprint = job.fingerprint("scatter_gather")

    def room(self, shard: list[Segment]) -> int:
        """Bytes that a message takes at most; those that it takes if the sizes do not vary."""
        return self._head(shard) + sum(aligned(self._most(segment)) for segment in shard)

    def write(
        self, shard: list[Segment], message: Any, writes: Iterator[Callable[[Any], int]]
    ) -> tuple[list[int], int]:
        """Fill a message with what the next of ``writes`` write; returns the sizes of its payloads and its length."""
        at, sizes = self._head(shard), []
        # The next of writes belongs to the next shard.
        for segment in shard:
            size = next(writes)(message[at : at + self._most(segment)])
            sizes.append(size)
            at += aligned(size)
        write_words(message, [self.fingerprint, *(sizes if self.job.codec.variable_size else [])])
        return sizes, at

    def heads(self, shards: list[list[Segment]], messages: Any) -> Generator[Request, Any, list[list[int]]]:
        """The words at the start of the messages that carry some shards; none if sizes do not vary."""
        if not self.job.codec.variable_size:
            return [[] for _ in shards]
        return (yield from read_heads(messages, [self._head(shard) for shard in shards], f"{self.job.name}.heads"))

    def spans(
        self, shard: list[Segment], message: Any, at: int, rank: int, words: list[int]
    ) -> tuple[list[tuple[int, int]], int]:
        """Where the payloads stand in the message of a rank that begins at ``at`` with ``words``, and where it ends.

        Raises:
            ExchangeError: it is another message than was expected.
        """
        detail = other_message(rank)
        sizes = most = [self._most(segment) for segment in shard]
        if self.job.codec.variable_size:
            sizes = words[1:]
            if words[:1] != [self.fingerprint] or len(sizes) != len(most) or any(map(gt, sizes, most)):
                raise self.job.disagreement(detail)
        else:
            self.job.expect(message[at : at + self._head(shard)], [self.fingerprint], detail)
        at += self._head(shard)
        spans = []
        for size in sizes:
            spans.append((at, at + size))
            at += aligned(size)
        if at > len(message):
            raise self.job.disagreement(detail)
        return spans, at

    def _head(self, shard: list[Segment]) -> int:
        return 4 * (1 + len(shard) * self.job.codec.variable_size)

    def _most(self, segment: Segment) -> int:
        return self.job.codec.payload_size(segment.stop - segment.start)


def work(codec: Codec, length: int, ranks: int) -> Work:
    sent = (ranks - 1) / ranks * codec.payload_size(length)
    return Work({"alltoall": sent, "allgather": sent}, encoded=length * (1 + 1 / ranks), decoded=2 * length)


def carries(codec: Codec) -> bool:
    return codec.encodes and codec.encodes_means and codec.granularity > 0


SCATTER_GATHER = Exchange(scatter_gather, work, carries, ("alltoall", "allgather"), preference=2)
