"""scatter_gather: each rank averages one shard and sends the encoded mean to all others.

About two payloads a rank, whatever the number of ranks, at the price of a second rounding.
Known as scatter-reduce-allgather in CGX (Markov et al., Middleware 2022, arXiv 2111.08617).
"""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.exchanges.base import (
    AllGather,
    AllToAll,
    Exchange,
    Job,
    Steps,
    Work,
    read_words,
    shard_bytes,
    shards_of,
    write_header,
)


def scatter_gather(job: Job) -> Steps:
    """Message between two ranks: fingerprint, then the payloads of the receiver's shard.

    The owner of a shard uses its own decoded payload like everybody else, so that all ranks
    hold the same bits.
    """
    fingerprint = job.fingerprint("scatter_gather")
    shards = shards_of(job)
    sizes = [shard_bytes(segments) for segments in shards]
    message = job.empty(sum(sizes), "uint8")
    at = 0
    for segments, size in zip(shards, sizes):
        part = message[at : at + size]
        write_header(part, fingerprint)
        for segment in segments:
            x = segment.of(segment.piece.x)
            job.kernels.encode_into(x, segment.payload(part), segment.piece.key(), segment.first)
            if segment.piece.keep_error:
                job.kernels.decode_into(segment.payload(part), x, "subtract")
            segment.piece.payload_bytes += segment.size
        at += size

    received, received_sizes = yield AllToAll(f"{job.name}.alltoall", message, sizes)

    own, own_size = shards[job.rank], sizes[job.rank]
    if list(received_sizes) != [own_size] * job.ranks:
        raise job.disagreement(
            f"messages of {list(received_sizes)} bytes came where {own_size} were expected from each"
        )
    reply = job.empty(own_size, "uint8")
    write_header(reply, fingerprint)
    starts = [rank * own_size for rank in range(job.ranks)]
    for rank, start in enumerate(starts):
        if read_words(received[start : start + own_size], 1) != [fingerprint]:
            raise job.disagreement(f"rank {rank} sent something else than was expected")
    for segment in own:
        mean = segment.of(segment.piece.out)
        spans = [(start + segment.offset, start + segment.offset + segment.size) for start in starts]
        job.kernels.average_into(received, spans, mean)
        job.kernels.encode_into(mean, segment.payload(reply), segment.piece.key(phase=1), segment.first)
        if segment.piece.keep_error:
            # What the second rounding loses, this rank adds to its next gradient.
            job.kernels.decode_into(segment.payload(reply), mean, "subtract")
            mean *= job.ranks
            residual = segment.of(segment.piece.x)
            residual += mean

    gathered = yield AllGather(f"{job.name}.allgather", reply)

    if len(gathered) != sum(sizes):
        raise job.disagreement(f"{len(gathered)} bytes of means came where {sum(sizes)} were expected")
    job.wire_bytes += (sum(sizes) - own_size) * 2
    at = 0
    for segments, size in zip(shards, sizes):
        part = gathered[at : at + size]
        for segment in segments:
            job.kernels.decode_into(segment.payload(part), segment.of(segment.piece.out), "set")
        at += size


def work(codec: Codec, length: int, ranks: int) -> Work:
    sent = (ranks - 1) / ranks * codec.payload_size(length)
    return Work({"alltoall": sent, "allgather": sent}, encoded=length * (1 + 1 / ranks), decoded=2 * length)


SCATTER_GATHER = Exchange(scatter_gather, work)
