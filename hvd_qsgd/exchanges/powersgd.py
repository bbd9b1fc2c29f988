"""powersgd: one step of subspace iteration on the mean gradient, by two allreduces of thin matrices.

Source: Vogels, Karimireddy, Jaggi, PowerSGD, NeurIPS 2019 (arXiv 1905.13727), Algorithms 1 and 2:
P = mean of M Q, orthogonalized; Q = mean of M^T P; the gradient is P Q^T, this rank's residual
M - P (M^T P)^T, and Q is where the next step starts.

A column of Q that is zero would stay so for ever, since P = M Q and Q = M^T P. Gradients of zero or
of low rank leave such columns, so they are drawn anew. The others are scaled, which changes no basis,
so that small gradients do not vanish from their products, and large ones do not overflow.

Both sums are the same on all ranks; what follows from them is so on processors and libraries of
one kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_qsgd.codecs.powersgd import PowerSGD
from hvd_qsgd.codecs.random_words import words
from hvd_qsgd.exchanges.base import AllReduce, Exchange, Job, Piece, Steps, Work, look, ring_bytes, sent
from hvd_qsgd.exchanges.linear import checked_sum

#: Share of a column's norm that float32 cannot tell from rounding.
NEGLIGIBLE = 1e-5


def powersgd(job: Job) -> Steps:
    """The sums of [1, check bits, P of each piece] and of [Q of each piece]."""
    codec = job.codec
    assert isinstance(codec, PowerSGD)
    check = job.check_bits("powersgd")
    shapes = [matrix_shape(piece) for piece in job.pieces]
    factors = [_start(codec, piece, *shape) if codec.pays(*shape) else None for piece, shape in zip(job.pieces, shapes)]

    parts = []
    for piece, shape, factor in zip(job.pieces, shapes, factors):
        parts.append(piece.x if factor is None else (piece.x.reshape(shape) @ factor).reshape(-1))
    message = _packed(job, [1, check], parts)

    sums = yield AllReduce(f"{job.name}.p", message, "sum")

    job.wire_bytes += ring_bytes(4 * len(message), job.ranks)
    contributors = yield from checked_sum(job, sums, check)
    left: list[Any] = []
    right: list[Any] = []
    for piece, shape, factor, total in zip(job.pieces, shapes, factors, _parts(sums[2:], parts)):
        piece.payload_bytes = 4 * len(total)
        if factor is None:
            left.append(None)
            if piece.keep_error:
                piece.x[...] = 0
            piece.out[...] = total / contributors
            continue
        basis = orthogonalized((total / contributors).reshape(shape[0], -1))
        left.append(basis)
        right.append((piece.x.reshape(shape).T @ basis).reshape(-1))
    if not right:
        return
    message = _packed(job, [], right)
    own = [part + 0 for part in right]

    sums = yield AllReduce(f"{job.name}.q", message, "sum")

    job.wire_bytes += ring_bytes(4 * len(message), job.ranks)
    thin = iter(zip(_parts(sums, right), own))
    found: list[tuple[Piece, Any]] = []
    for piece, shape, basis in zip(job.pieces, shapes, left):
        if basis is None:
            continue
        total, mine = next(thin)
        piece.payload_bytes += 4 * len(total)
        factor = (total / contributors).reshape(shape[1], -1)
        if piece.keep_error:
            piece.x -= (basis @ mine.reshape(shape[1], -1).T).reshape(-1)
        piece.out[...] = (basis @ factor.T).reshape(-1)
        found.append((piece, factor))
    largest = [_largest(factor) for _, factor in found]
    seen = yield from look(job, largest)
    for (piece, factor), divisors, magnitudes in zip(found, largest, seen):
        if np.isfinite(magnitudes).all():
            factor /= _or_one(divisors)
            if dead := np.flatnonzero(magnitudes == 0).tolist():
                # Of another phase than the first numbers, which may be what led here.
                drawn = _random(piece, len(factor), codec.rank, dead, phase=1)
                for i, column in enumerate(dead):
                    factor[:, column] = drawn[:, i]
            piece.memory["q"] = factor


def matrix_shape(piece: Piece) -> tuple[int, int]:
    """Rows and columns: the first dimension, and all others."""
    shape = piece.shape if piece.shape else (len(piece.x),)
    return shape[0], math.prod(shape[1:])


def orthogonalized(matrix: Any) -> Any:
    """The columns made orthonormal one after the other (modified Gram-Schmidt), in place.

    A column that the ones before it nearly span becomes zero: what is left of it is rounding.
    """
    matrix /= _or_one(_largest(matrix))
    before = [_norm(matrix[:, i]) for i in range(matrix.shape[1])]
    for i in range(matrix.shape[1]):
        column = matrix[:, i]
        column /= _or_infinity(_norm(column), NEGLIGIBLE * before[i])
        if i + 1 < matrix.shape[1]:
            rest = matrix[:, i + 1 :]
            rest -= column[:, None] * (column @ rest)[None, :]
    return matrix


def _largest(matrix: Any) -> Any:
    """The largest magnitude of each column; NaN where one is in it."""
    return abs(matrix).max(0) if isinstance(matrix, np.ndarray) else abs(matrix).amax(0)


def _or_one(divisors: Any) -> Any:
    return divisors + (divisors == 0)


def _norm(column: Any) -> Any:
    """A number; of a tensor one that stays on its device."""
    squares = (column * column).sum()
    return float(squares) ** 0.5 if isinstance(column, np.ndarray) else squares.sqrt()


def _or_infinity(norm: Any, limit: Any) -> Any:
    """What makes zero of a column that is not longer than a limit."""
    if isinstance(norm, float):
        return math.inf if norm <= limit else norm
    return norm.masked_fill(norm <= limit, math.inf)


def _start(codec: PowerSGD, piece: Piece, rows: int, columns: int) -> Any:
    """Q of the step before, or random numbers in [-1, 1) that are the same on all ranks."""
    if "q" in piece.memory:
        factor = piece.memory["q"]
        # After a checkpoint it may be an array of another library, or on another device.
        return np.asarray(factor) if isinstance(piece.x, np.ndarray) else factor.to(piece.x.device)
    return _random(piece, columns, codec.rank, range(codec.rank))


def _random(piece: Piece, rows: int, columns: int, chosen: Sequence[int], phase: int = 0) -> Any:
    """Some columns of a matrix of random numbers in [-1, 1), the same on all ranks."""
    drawn = words(piece.key(phase), 0, rows * columns).reshape(rows, columns)[:, chosen]
    numbers = (drawn.astype(np.float64) / 2**31 - 1).astype(np.float32)
    if isinstance(piece.x, np.ndarray):
        return numbers
    return sent(piece.x, numbers.tobytes()).view(piece.x.dtype).reshape(rows, -1)


def _packed(job: Job, head: list[int], parts: list[Any]) -> Any:
    message = job.empty(len(head) + sum(len(part) for part in parts), "float32")
    for i, value in enumerate(head):
        message[i] = value
    at = len(head)
    for part in parts:
        message[at : at + len(part)] = part
        at += len(part)
    return message


def _parts(message: Any, like: list[Any]) -> list[Any]:
    """The message cut into parts of these lengths."""
    ends = np.cumsum([len(part) for part in like]).tolist()
    return [message[end - len(part) : end] for end, part in zip(ends, like)]


def work(codec: Any, length: int, ranks: int) -> Work:
    """As if the tensor were a square matrix."""
    factors = 2 * codec.rank * length**0.5
    return Work({"allreduce": ring_bytes(4 * min(factors, length), ranks)}, agreements=1)


def carries(codec: Any) -> bool:
    return isinstance(codec, PowerSGD)


POWERSGD = Exchange(powersgd, work, carries, preference=4)
