"""linear: one SUM-allreduce of words that every rank computes without knowing the others.

For codecs whose messages add up: RandomK, whose ranks all draw the same positions. One
phase, 2 (n-1)/n messages a rank, and whatever reduces float32 words can carry it. A rank
that has joined contributes zeros. The order of a floating-point sum is that of the
allreduce, which gives all ranks the same bits.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from hvd_qsgd.codecs.base import adds_values
from hvd_qsgd.exchanges.base import AllReduce, Exchange, Job, Request, Steps, ToHost, Work, is_torch, ring_bytes


def linear(job: Job) -> Steps:
    """The sum of [1, check bits, words of each piece]."""
    # SumKernels and SumCodec.
    kernels: Any = job.kernels
    codec: Any = job.codec
    check = job.check_bits("linear")
    lengths = [codec.sum_length(len(piece.x)) for piece in job.pieces]
    message = job.empty(2 + sum(lengths), codec.sum_dtype)
    message[:1], message[1:2] = 1, check
    at = 2
    for piece, length in zip(job.pieces, lengths):
        words = message[at : at + length]
        kernels.to_sum(piece.x, words, piece.key(), piece.first)
        if piece.keep_error:
            own = job.empty(len(piece.x), "float32")
            kernels.from_sum(words, own, 1, piece.key(), piece.first)
            piece.x -= own
        piece.payload_bytes = 4 * length
        at += length

    sums = yield AllReduce(f"{job.name}.sum", message, "sum")

    job.wire_bytes += ring_bytes(4 * len(message), job.ranks)
    contributors = yield from checked_sum(job, sums, check)
    at = 2
    for piece, length in zip(job.pieces, lengths):
        kernels.from_sum(sums[at : at + length], piece.out, contributors, piece.key(), piece.first)
        at += length


def checked_sum(job: Job, sums: Any, check: int) -> Generator[Request, Any, int]:
    """How many ranks contributed to a sum of [1, check word, ...].

    Raises:
        ExchangeError: ranks with other check words did.
    """
    head = sums[:2]
    seen = (yield ToHost(f"{job.name}.contributors", head)) if is_torch(head) else head
    contributors, checks = (int(number) for number in seen)
    if checks != contributors * check:
        raise job.other_sums()
    return contributors


def work(codec: Any, length: int, ranks: int) -> Work:
    sent = ring_bytes(4 * codec.sum_length(length), ranks)
    return Work({"allreduce": sent}, encoded=length, decoded=length)


LINEAR = Exchange(linear, work, adds_values, ("sum_float",), preference=4)
