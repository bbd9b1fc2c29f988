"""intsgd: one SUM-allreduce of small integers, with no agreement on scales.

Source: Mishchenko, Wang, Kovalev, Richtarik, IntSGD, ICLR 2022 (arXiv 2102.08374), Algorithm 1
and the authors' code: integers are round(alpha x) with alpha = fineness * sqrt(d) / (sqrt(2 n) * sqrt(r)),
and r = beta * r + (1 - beta) * ||mean||^2 is the same on all ranks, because means are.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np

from hvd_qsgd.codecs.intsgd import IntSGD
from hvd_qsgd.exchanges.allreduce import allreduce
from hvd_qsgd.exchanges.base import (
    CHECK_BITS,
    AllReduce,
    Exchange,
    Job,
    Piece,
    Steps,
    Work,
    all_finite,
    look,
    ring_bytes,
)
from hvd_qsgd.exchanges.linear import checked_sum
from hvd_qsgd.kernels import kernels_of


def intsgd(job: Job) -> Steps:
    """The sum of [1, check word, then of each piece: 1 if not finite, lanes]."""
    codec = job.codec
    assert isinstance(codec, IntSGD)
    if not all(piece.memory.get("square") for piece in job.pieces):
        first = Job(job.name, job.pieces, kernels_of(codec.first_grid, job.pieces[0].x), job.rank, job.ranks, job.empty)
        yield from allreduce(first)
        yield from first.finish()
        job.wire_bytes += first.wire_bytes
        yield from _learn(job, codec.beta)
        return
    kernels: Any = kernels_of(codec.grid, job.pieces[0].x)
    scales = [np.float32(codec.grid.levels * step_size(codec, piece, job.ranks)) for piece in job.pieces]
    lengths = [codec.grid.lanes_length(len(piece.x), job.ranks) for piece in job.pieces]
    # Ranks whose grids differ, by another processor's sums perhaps, must not add up.
    grids = int.from_bytes(hashlib.blake2b(np.array(scales).tobytes(), digest_size=4).digest(), "little")
    check = (job.fingerprint("intsgd") ^ grids) & ((1 << CHECK_BITS) - 1)
    *starts, end = itertools.accumulate((1 + length for length in lengths), initial=2)
    message = job.empty(end, "int32")
    message[0], message[1] = 1, check
    of_pieces = yield from all_finite(job, [piece.x for piece in job.pieces])
    for piece, scale, length, at, finite in zip(job.pieces, scales, lengths, starts, of_pieces):
        lanes = message[at + 1 : at + 1 + length]
        message[at] = int(not finite)
        if finite:
            agreed = _agreed(job, codec, piece, scale)
            clipped = piece.x.clip(-float(scale), float(scale))
            kernels.to_lanes(clipped, agreed, job.ranks, lanes, piece.key(), piece.first)
            if piece.keep_error:
                own = job.empty(len(piece.x), "float32")
                kernels.from_lanes(lanes, agreed, job.ranks, own, 1)
                piece.x -= own
        else:
            lanes[...] = 0
        piece.payload_bytes = 4 * (1 + length)

    sums = yield AllReduce(f"{job.name}.integers", message, "sum")

    job.wire_bytes += ring_bytes(4 * len(message), job.ranks)
    contributors = yield from checked_sum(job, sums, check)
    spoiled = yield from look(job, [sums[at : at + 1] for at in starts])
    for piece, scale, length, at, flag in zip(job.pieces, scales, lengths, starts, spoiled):
        if int(flag[0]):
            piece.out[...] = float("nan")
        else:
            lanes = sums[at + 1 : at + 1 + length]
            kernels.from_lanes(lanes, _agreed(job, codec, piece, scale), job.ranks, piece.out, contributors)
    yield from _learn(job, codec.beta)


def step_size(codec: IntSGD, piece: Piece, ranks: int) -> float:
    """1 / alpha: the distance of two levels."""
    return float((2 * ranks * piece.memory["square"] / len(piece.x)) ** 0.5 / codec.fineness)


def _learn(job: Job, beta: float) -> Steps:
    """Follow the squared norms of the means, as far as they are finite."""
    squares = yield from look(job, [(piece.out * piece.out).sum()[None] for piece in job.pieces])
    for piece, (square,) in zip(job.pieces, squares):
        if np.isfinite(square):
            before = piece.memory.get("square")
            piece.memory["square"] = beta * before + (1 - beta) * float(square) if before else float(square)


def _agreed(job: Job, codec: IntSGD, piece: Piece, scale: np.float32) -> Any:
    """The words that the grid takes for agreed scales."""
    agreed = job.empty(codec.grid.agreement_length(len(piece.x)), "int32")
    agreed[...] = int(scale.view(np.int32))
    return agreed


def work(codec: Any, length: int, ranks: int) -> Work:
    words = codec.grid.lanes_length(length, ranks)
    return Work({"allreduce": ring_bytes(4 * words, ranks)}, lanes=length)


INTSGD = Exchange(intsgd, work)
