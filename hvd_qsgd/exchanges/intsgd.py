"""intsgd: one SUM-allreduce of small integers, with no agreement on scales.

Source: Mishchenko, Wang, Kovalev, Richtarik, IntSGD, ICLR 2022 (arXiv 2102.08374), Algorithm 1
and the authors' code: integers are round(alpha x) with alpha = fineness * sqrt(d) / (sqrt(2 n) * sqrt(r)),
and r = beta * r + (1 - beta) * ||mean||^2 is the same on all ranks, because means are.

Integers have few bits here, so large values are clipped, which makes means smaller, and so the next
step, which clips more: sparse gradients would shrink to nothing. Where a rank loses much, r grows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
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
    look,
    ring_bytes,
)
from hvd_qsgd.exchanges.linear import checked_sum
from hvd_qsgd.kernels import kernels_of

#: Shares of the sum of a rank's magnitudes that clipping takes away, and the factors by which r grows then: two steps
#: as long, and so much longer that it soon fits whatever the gradient was before.
MUCH, MOST = 1 / 8, 31 / 32
MUCH_FACTOR, MOST_FACTOR = 4.0, 65536.0
#: In its word of the message, of one rank that loses most; above the number of all that lose much.
MOST_FLAG = 1 << 13


def intsgd(job: Job) -> Steps:
    """The sum of [1, check word, then of each piece: 1 if not finite, what clipping takes away, lanes]."""
    codec = job.codec
    assert isinstance(codec, IntSGD)
    if not all(piece.memory.get("square") for piece in job.pieces):
        first = Job(job.name, job.pieces, kernels_of(codec.first_grid, job.pieces[0].x), job.rank, job.ranks, job.empty)
        yield from allreduce(first)
        yield from first.finish()
        job.wire_bytes += first.wire_bytes
        yield from _learn(job, codec.beta, [0] * len(job.pieces))
        return
    kernels: Any = kernels_of(codec.grid, job.pieces[0].x)
    scales = [np.float32(codec.grid.levels * step_size(codec, piece, job.ranks)) for piece in job.pieces]
    lengths = [codec.grid.lanes_length(len(piece.x), job.ranks) for piece in job.pieces]
    # Ranks whose grids differ, by another processor's sums perhaps, must not add up.
    grids = int.from_bytes(hashlib.blake2b(np.array(scales).tobytes(), digest_size=4).digest(), "little")
    check = (job.fingerprint("intsgd") ^ grids) & ((1 << CHECK_BITS) - 1)
    *starts, end = itertools.accumulate((2 + length for length in lengths), initial=2)
    message = job.empty(end, "int32")
    message[0], message[1] = 1, check
    clipped = [piece.x.clip(-float(scale), float(scale)) for piece, scale in zip(job.pieces, scales)]
    measured = yield from look(
        job, [part for piece, kept in zip(job.pieces, clipped) for part in _measure(piece.x, kept)]
    )
    for i, (piece, scale, length, at) in enumerate(zip(job.pieces, scales, lengths, starts)):
        largest, whole, kept = (float(value[0]) for value in measured[3 * i : 3 * i + 3])
        lanes = message[at + 2 : at + 2 + length]
        message[at] = int(not largest < np.inf)
        message[at + 1] = MOST_FLAG if kept < (1 - MOST) * whole else int(kept < (1 - MUCH) * whole)
        if largest < np.inf:
            agreed = _agreed(job, codec, piece, scale)
            kernels.to_lanes(clipped[i], agreed, job.ranks, lanes, piece.key(), piece.first)
            if piece.keep_error:
                own = job.empty(len(piece.x), "float32")
                kernels.from_lanes(lanes, agreed, job.ranks, own, 1)
                piece.x -= own
        else:
            lanes[...] = 0
        piece.payload_bytes = 4 * (2 + length)

    sums = yield AllReduce(f"{job.name}.integers", message, "sum")

    job.wire_bytes += ring_bytes(4 * len(message), job.ranks)
    contributors = yield from checked_sum(job, sums, check)
    flags = yield from look(job, [sums[at : at + 2] for at in starts])
    for piece, scale, length, at, (spoiled, _) in zip(job.pieces, scales, lengths, starts, flags):
        if spoiled:
            piece.out[...] = float("nan")
        else:
            lanes = sums[at + 2 : at + 2 + length]
            kernels.from_lanes(lanes, _agreed(job, codec, piece, scale), job.ranks, piece.out, contributors)
    yield from _learn(job, codec.beta, [int(lost) for _, lost in flags])


def _measure(x: Any, clipped: Any) -> list[Any]:
    """The largest magnitude, and the sums of magnitudes before and after clipping, each as an array of one element."""
    magnitudes = abs(x)
    return [magnitudes.max()[None], magnitudes.sum()[None], abs(clipped).sum()[None]]


def step_size(codec: IntSGD, piece: Piece, ranks: int) -> float:
    """1 / alpha: the distance of two levels."""
    return float((2 * ranks * piece.memory["square"] / len(piece.x)) ** 0.5 / codec.fineness)


def _learn(job: Job, beta: float, lost: Sequence[int]) -> Steps:
    """Follow the squared norms of the means, as far as they are finite.

    A mean of zero tells nothing of the next ones: many of them would leave a step so small that all is clipped.

    Args:
        lost: of each piece the sum of what ranks say of clipping.
    """
    squares = yield from look(job, [(piece.out * piece.out).sum()[None] for piece in job.pieces])
    for piece, (value,), flag in zip(job.pieces, squares, lost):
        square = float(value)
        before = piece.memory.get("square")
        if before and square and np.isfinite(square):
            grown = before * (MOST_FACTOR if flag >= MOST_FLAG else MUCH_FACTOR) if flag else 0.0
            piece.memory["square"] = max(beta * before + (1 - beta) * square, grown)
        elif np.isfinite(square):
            piece.memory["square"] = square


def _agreed(job: Job, codec: IntSGD, piece: Piece, scale: np.float32) -> Any:
    """The words that the grid takes for agreed scales."""
    agreed = job.empty(codec.grid.agreement_length(len(piece.x)), "int32")
    agreed[...] = int(scale.view(np.int32))
    return agreed


def work(codec: Any, length: int, ranks: int) -> Work:
    words = codec.grid.lanes_length(length, ranks)
    return Work({"allreduce": ring_bytes(4 * words, ranks)}, lanes=length)


def carries(codec: Any) -> bool:
    return isinstance(codec, IntSGD)


INTSGD = Exchange(intsgd, work, carries, preference=4)
