"""Run every exchange over MPI and compare with the simulated ranks. Started by ``test_mpi_collectives.py``.

Every rank simulates all of them and compares its own part; it exits with an error on the first byte that differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
from checkers import check_same_bits, flip_bit, gauss, make_jobs, run_exchange
from mpi4py import MPI

from hvd_qsgd import QSGD, Cast, Codec, EliasQSGD, ExchangeError, Identity, TopK
from hvd_qsgd.collectives.mpi import MPICollectives
from hvd_qsgd.exchanges import EXCHANGES, Job, exchanges_for
from hvd_qsgd.reduction import progress

CODECS: list[Codec] = [
    QSGD(),
    QSGD(bits=3, bucket_size=16, rounding="nearest"),
    QSGD(bits=8, norm="l2"),
    TopK(ratio=0.05),
    TopK(k=7, values="float16"),
    Identity(),
    Cast("bfloat16"),
    EliasQSGD(),
]


def cases() -> Iterator[tuple[str, Codec, str, bool]]:
    for codec in CODECS:
        for exchange in exchanges_for(codec):
            for backend, keep_error in (("numpy", False), ("numba", True)):
                yield exchange, codec, backend, keep_error


def make_inputs(ranks: int, step: int) -> list[list[np.ndarray]]:
    inputs = [
        [gauss(length, 1000 * step + 10 * rank + i) for i, length in enumerate((1000, 0, 1, 515))]
        for rank in range(ranks)
    ]
    if step == 1:
        inputs[ranks - 1][0][700] = np.nan
    return inputs


def over_mpi(exchange: str, job: Job, collectives: MPICollectives) -> None:
    with np.errstate(invalid="ignore"):
        progress.run_exchange(EXCHANGES[exchange](job), collectives)


def compare(collectives: MPICollectives, corrupt: bool) -> int:
    """The number of exchanges that ended in the bytes of the simulation."""
    rank, ranks = collectives.rank, collectives.ranks
    compared = 0
    for exchange, codec, backend, keep_error in cases():
        for step in (0, 1):
            options = {"backend": backend, "keep_error": keep_error, "step": step}
            simulated, own = (make_jobs(codec, make_inputs(ranks, step), **options) for _ in range(2))
            run_exchange(exchange, simulated)
            over_mpi(exchange, own[rank], collectives)
            if corrupt and rank == ranks - 1:
                own[rank].pieces[3].out[:] = flip_bit(own[rank].pieces[3].out, 77)
            for piece, expected in zip(own[rank].pieces, simulated[rank].pieces):
                check_same_bits(piece.out, expected.out)
                check_same_bits(piece.x, expected.x)
                assert piece.payload_bytes == expected.payload_bytes
            assert own[rank].wire_bytes == simulated[rank].wire_bytes
            compared += 1
    return compared


def disagree(collectives: MPICollectives) -> None:
    """A rank with other settings is found out by all ranks, and nobody waits forever."""
    for exchange in exchanges_for(QSGD()):
        # Lengths that differ in an allreduce are beyond what MPI defines; these settings give equal ones.
        codecs = [QSGD(rounding="nearest"), *[QSGD()] * (collectives.ranks - 1)]
        job = make_jobs(codecs, make_inputs(collectives.ranks, 0))[collectives.rank]
        try:
            over_mpi(exchange, job, collectives)
        except ExchangeError:
            continue
        raise AssertionError(f"rank {collectives.rank} did not notice in {exchange}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corrupt", action="store_true", help="flip one bit, to see the comparison fail")
    arguments = parser.parse_args()
    collectives = MPICollectives()
    compared = compare(collectives, arguments.corrupt)
    disagree(collectives)
    total = MPI.COMM_WORLD.reduce(compared)
    collectives.close()
    if MPI.COMM_WORLD.rank == 0:
        print(f"{total} exchanges compared", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        # Otherwise the other ranks would wait for this one.
        print(f"rank {MPI.COMM_WORLD.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)
