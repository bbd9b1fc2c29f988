"""allgather: every rank sends its payloads to all others, and each decodes them all.

(n-1) payloads a rank, one phase, no second rounding. The only exchange for payloads of
variable size, and the best one for two or three ranks.
"""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.exchanges.base import (
    AllGather,
    Exchange,
    Job,
    Steps,
    Work,
    aligned,
    other_message,
    prepared,
    read_heads,
    write_words,
)


def allgather(job: Job) -> Steps:
    """Message of a rank: fingerprint, the size of each payload, the payloads (4-byte aligned)."""
    fingerprint = job.fingerprint("allgather")
    head = 4 * (1 + len(job.pieces))
    writes = yield from prepared(
        job,
        (
            job.kernels.with_memory(piece.memory).prepare_encode(piece.x, piece.key(), piece.first, piece.keep_error)
            for piece in job.pieces
        ),
    )
    message = job.empty(head + sum(aligned(job.codec.payload_size(len(piece.x))) for piece in job.pieces), "uint8")
    at = head
    for piece, write in zip(job.pieces, writes):
        piece.payload_bytes = write(message[at:])
        at += aligned(piece.payload_bytes)
    own = [fingerprint, *(piece.payload_bytes for piece in job.pieces)]
    write_words(message, own)

    gathered = yield AllGather(f"{job.name}.allgather", message[:at])

    job.wire_bytes += len(gathered) - at
    heads = [own] * job.ranks
    if job.codec.variable_size:
        heads = yield from read_heads(gathered, [head] * job.ranks, f"{job.name}.heads")
    at = 0
    spans: list[list[tuple[int, int]]] = [[] for _ in job.pieces]
    for rank, words in enumerate(heads):
        detail = other_message(rank)
        if not job.codec.variable_size:
            job.expect(gathered[at : at + head], words, detail)
        elif at + head > len(gathered) or words[0] != fingerprint:
            raise job.disagreement(detail)
        at += head
        for size, of_piece in zip(words[1:], spans):
            of_piece.append((at, at + size))
            at += aligned(size)
    if at != len(gathered):
        raise job.disagreement(f"{len(gathered)} bytes came where {at} were expected")
    averages = yield from prepared(
        job,
        (job.kernels.prepare_average(gathered, of_piece, len(piece.x)) for piece, of_piece in zip(job.pieces, spans)),
    )
    for piece, average in zip(job.pieces, averages):
        average(piece.out)


def work(codec: Codec, length: int, ranks: int) -> Work:
    sent = (ranks - 1) * codec.payload_size(length)
    return Work({"allgather": sent}, encoded=length, decoded=ranks * length)


def carries(codec: Codec) -> bool:
    return codec.encodes


ALLGATHER = Exchange(allgather, work, carries, ("allgather",), preference=3)
