"""All ranks inside one process, in step: exchanges at 1 to 1024 ranks without a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.exchanges.base import AllGather, AllReduce, AllToAll, Request, Steps, ToHost


def simulate(ranks: Sequence[Steps]) -> None:
    """Run one exchange on all its ranks to the end; ``ranks[r]`` is the generator of rank ``r``.

    Raises:
        ExchangeError: the ranks ask for different collectives, or some end before others.

    Examples:
        >>> from hvd_qsgd import QSGD
        >>> from hvd_qsgd.exchanges import EXCHANGES, Job, Piece
        >>> from hvd_qsgd.kernels import kernels_for
        >>> kernels = kernels_for(QSGD(bits=8, rounding="nearest"), "numpy")
        >>> pieces = [Piece("x", np.full(4, value, np.float32), np.empty(4, np.float32)) for value in (1, 2, 6)]
        >>> jobs = [Job("mean", [piece], kernels, rank, 3, np.empty) for rank, piece in enumerate(pieces)]
        >>> simulate([EXCHANGES["allgather"](job) for job in jobs])
        >>> [piece.out.tolist() for piece in pieces] == 3 * [[3.0, 3.0, 3.0, 3.0]]
        True
    """
    outcomes: list[Any] = [None] * len(ranks)
    while True:
        requests = [_advance(steps, outcome) for steps, outcome in zip(ranks, outcomes)]
        if all(request is None for request in requests):
            return
        outcomes = perform([request for request in requests if request is not None], len(ranks))


def _advance(steps: Steps, outcome: Any) -> Request | None:
    """Go on to the next collective; how often a rank looks at its own arrays is its own affair."""
    try:
        request = steps.send(outcome)
        while isinstance(request, ToHost):
            request = steps.send(np.asarray(request.array))
        return request
    except StopIteration:
        return None


def perform(requests: Sequence[Request], ranks: int) -> list[Any]:
    """The outcome of one collective for each rank."""
    first = requests[0]
    if len(requests) != ranks or any((type(r), r.name) != (type(first), first.name) for r in requests):
        raise ExchangeError(
            f"The ranks ask for different collectives: {[(type(r).__name__, r.name) for r in requests]}"
        )
    if isinstance(first, AllGather):
        gathered = np.concatenate([request.array for request in requests])
        return [gathered.copy() for _ in requests]
    if isinstance(first, AllToAll):
        return _alltoall([request for request in requests if isinstance(request, AllToAll)])
    return _allreduce([request for request in requests if isinstance(request, AllReduce)])


def _alltoall(requests: list[AllToAll]) -> list[Any]:
    parts = [np.split(request.array, np.cumsum(request.splits)[:-1]) for request in requests]
    received = [[part[rank] for part in parts] for rank in range(len(requests))]
    return [(np.concatenate(messages), [len(message) for message in messages]) for messages in received]


def _allreduce(requests: list[AllReduce]) -> list[Any]:
    exact = np.int64 if requests[0].array.dtype == np.int32 else np.float32
    total = requests[0].array.astype(exact)
    for request in requests[1:]:
        if len(request.array) != len(total):
            raise ExchangeError(f"allreduce {request.name!r}: {len(request.array)} and {len(total)} words")
        total = np.maximum(total, request.array) if request.op == "max" else total + request.array
    dtype = requests[0].array.dtype
    if exact is np.int64 and (total != total.astype(np.int32)).any():
        raise ExchangeError(f"allreduce {requests[0].name!r} overflows int32")
    return [total.astype(dtype) for _ in requests]
