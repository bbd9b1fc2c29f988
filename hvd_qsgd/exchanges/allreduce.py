"""allreduce: levels on scales that all ranks share, added up inside int32 words.

Exactly linear: one rounding, and whatever reduces int32 words can carry it (NCCL,
hierarchical allreduce, Horovod's fusion). A rank that has joined contributes zero bits,
which are level 0 here.
Source: the principle of Global-QSGD (Xin et al., arXiv 2305.18627) and SwitchML (Sapio et
al., NSDI 2021); the packing into lanes is described in ``docs/wire-format.md``.
"""

from __future__ import annotations

from typing import Any

from hvd_qsgd.codecs.base import adds_in_lanes
from hvd_qsgd.exchanges.base import (
    AllReduce,
    Exchange,
    Job,
    Steps,
    Work,
    as_bytes,
    read_words,
    ring_bytes,
    write_words,
)

FINGERPRINT_MAX = 0x7FFFFFFF


def allreduce(job: Job) -> Steps:
    """Two allreduces: the maximum of [fingerprint, its complement, scales], the sum of [1, lanes]."""
    # LaneKernels and LaneCodec.
    kernels: Any = job.kernels
    codec: Any = job.codec
    fingerprint = job.fingerprint("allreduce")
    agreement_lengths = [codec.agreement_length(len(piece.x)) for piece in job.pieces]
    lane_lengths = [codec.lanes_length(len(piece.x), job.ranks) for piece in job.pieces]

    agreed = job.empty(2 + sum(agreement_lengths), "int32")
    agreement = [fingerprint, FINGERPRINT_MAX - fingerprint]
    write_words(as_bytes(agreed[:2]), agreement)
    at = 2
    for piece, length in zip(job.pieces, agreement_lengths):
        kernels.agree_into(piece.x, agreed[at : at + length])
        at += length

    agreed = yield AllReduce(f"{job.name}.scales", agreed, "max")

    job.expect(as_bytes(agreed[:2]), agreement, "the ranks do not agree on what they exchange")
    lanes = job.empty(1 + sum(lane_lengths), "int32")
    lanes[:1] = 1
    scale_at, lane_at = 2, 1
    for piece, scale_length, lane_length in zip(job.pieces, agreement_lengths, lane_lengths):
        scales = agreed[scale_at : scale_at + scale_length]
        words = lanes[lane_at : lane_at + lane_length]
        kernels.to_lanes(piece.x, scales, job.ranks, words, piece.key(), piece.first)
        if piece.keep_error:
            own = job.empty(len(piece.x), "float32")
            kernels.from_lanes(words, scales, job.ranks, own, 1)
            piece.x -= own
        piece.payload_bytes = 4 * (scale_length + lane_length)
        scale_at += scale_length
        lane_at += lane_length

    sums = yield AllReduce(f"{job.name}.lanes", lanes, "sum")

    job.wire_bytes += ring_bytes(4 * (len(agreed) + len(lanes)), job.ranks)
    # Joined ranks count neither here nor in the carrier, whose product with this mean is right.
    (contributors,) = yield from read_words(as_bytes(sums[:1]), f"{job.name}.contributors")
    scale_at, lane_at = 2, 1
    for piece, scale_length, lane_length in zip(job.pieces, agreement_lengths, lane_lengths):
        scales = agreed[scale_at : scale_at + scale_length]
        kernels.from_lanes(sums[lane_at : lane_at + lane_length], scales, job.ranks, piece.out, contributors)
        scale_at += scale_length
        lane_at += lane_length


def work(codec: Any, length: int, ranks: int) -> Work:
    words = codec.agreement_length(length) + codec.lanes_length(length, ranks)
    return Work({"allreduce": ring_bytes(4 * words, ranks)}, lanes=length, agreements=1)


ALLREDUCE = Exchange(allreduce, work, adds_in_lanes, ("max", "sum"), preference=1)
