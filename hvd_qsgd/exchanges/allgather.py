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
    read_words,
    write_words,
)


def allgather(job: Job) -> Steps:
    """Message of a rank: fingerprint, the size of each payload, the payloads (4-byte aligned)."""
    fingerprint = job.fingerprint("allgather")
    head = 4 * (1 + len(job.pieces))
    message = job.empty(head + sum(aligned(job.codec.payload_size(len(piece.x))) for piece in job.pieces), "uint8")
    at = head
    for piece in job.pieces:
        size = job.kernels.with_memory(piece.memory).encode_into(piece.x, message[at:], piece.key(), piece.first)
        if piece.keep_error:
            job.kernels.decode_into(message[at : at + size], piece.x, "subtract")
        piece.payload_bytes = size
        at += aligned(size)
    own = [fingerprint, *(piece.payload_bytes for piece in job.pieces)]
    write_words(message, own)

    gathered = yield AllGather(f"{job.name}.allgather", message[:at])

    job.wire_bytes += len(gathered) - at
    at = 0
    spans: list[list[tuple[int, int]]] = [[] for _ in job.pieces]
    for rank in range(job.ranks):
        words, detail = own, other_message(rank)
        if job.codec.variable_size:
            words = yield from read_words(gathered[at : at + head], f"{job.name}.{rank}")
            if len(words) != len(own) or words[0] != fingerprint:
                raise job.disagreement(detail)
        else:
            job.expect(gathered[at : at + head], words, detail)
        at += head
        for size, of_piece in zip(words[1:], spans):
            of_piece.append((at, at + size))
            at += aligned(size)
    if at != len(gathered):
        raise job.disagreement(f"{len(gathered)} bytes came where {at} were expected")
    for piece, of_piece in zip(job.pieces, spans):
        job.kernels.average_into(gathered, of_piece, piece.out)


def work(codec: Codec, length: int, ranks: int) -> Work:
    sent = (ranks - 1) * codec.payload_size(length)
    return Work({"allgather": sent}, encoded=length, decoded=ranks * length)


ALLGATHER = Exchange(allgather, work, ("allgather",))
