"""Joined pieces: the tensors of a fusion buffer are encoded as if they were one."""

from __future__ import annotations

from collections.abc import Callable

from hvd_qsgd.exchanges.base import Job, Piece, Steps


def joined(exchange: Callable[[Job], Steps], job: Job) -> Steps:
    """Run an exchange with one piece that holds all pieces of ``job``, laid end to end."""
    lengths = [len(piece.x) for piece in job.pieces]
    first = job.pieces[0]
    x, out = job.empty(sum(lengths), "float32"), job.empty(sum(lengths), "float32")
    whole = Piece(
        str([piece.identity for piece in job.pieces]),
        x,
        out,
        first.stream,
        first.step,
        keep_error=any(piece.keep_error for piece in job.pieces),
        memory=first.memory,
    )
    at = 0
    for piece, length in zip(job.pieces, lengths):
        x[at : at + length] = piece.x
        at += length
    inner = Job(job.name, [whole], job.kernels, job.rank, job.ranks, job.empty)
    yield from exchange(inner)
    yield from inner.finish()
    job.wire_bytes += inner.wire_bytes
    at = 0
    for piece, length in zip(job.pieces, lengths):
        if piece.keep_error:
            piece.x[...] = x[at : at + length]
        piece.out[...] = out[at : at + length]
        # A share by length: nobody can say more of bytes that are in common.
        piece.payload_bytes = whole.payload_bytes * (at + length) // len(x) - whole.payload_bytes * at // len(x)
        at += length
