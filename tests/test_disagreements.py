"""Ranks that do not mean the same exchange: an error on those that notice, and never a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import flip_bit, make_inputs, make_jobs, run_exchange

from hvd_qsgd import QSGD, Codec, ExchangeError, Identity
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import EXCHANGES, exchanges_for
from hvd_qsgd.exchanges.base import AllGather

QSGD_PAIRS = pytest.mark.parametrize("exchange", exchanges_for(QSGD()))


@QSGD_PAIRS
@pytest.mark.parametrize(
    "other",
    [QSGD(bits=3), QSGD(bucket_size=256), QSGD(rounding="nearest"), QSGD(norm="l2"), Identity()],
    ids=str,
)
def test_ranks_with_other_settings_are_an_error(exchange: str, other: Codec) -> None:
    if exchange not in exchanges_for(other):
        other = QSGD(bits=8)
    jobs = make_jobs([QSGD(), QSGD(), other, QSGD()], make_inputs(4))
    with pytest.raises(ExchangeError):
        run_exchange(exchange, jobs)


@QSGD_PAIRS
@pytest.mark.parametrize("lengths", [(1000, 0, 1, 514), (1000, 0, 1), (1000, 0, 1, 515, 0), (1001, 0, 1, 514), ()])
def test_ranks_with_other_lengths_are_an_error(exchange: str, lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(4)
    inputs[1] = make_inputs(1, lengths)[0]
    with pytest.raises(ExchangeError):
        run_exchange(exchange, make_jobs(QSGD(), inputs))


@QSGD_PAIRS
def test_ranks_with_other_names_or_places_are_an_error(exchange: str) -> None:
    for field, value in (("name", "other"), ("first", 512)):
        jobs = make_jobs(QSGD(), make_inputs(4))
        setattr(jobs[3].pieces[0], field, value)
        with pytest.raises(ExchangeError, match="All ranks must run the same model with the same compressor settings"):
            run_exchange(exchange, jobs)


def test_ranks_with_another_codec_version_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(QSGD):
        version = 2

    for exchange in exchanges_for(QSGD()):
        jobs = make_jobs([QSGD(), QSGD()], make_inputs(2))
        jobs[1].kernels = Newer()
        with pytest.raises(ExchangeError):
            run_exchange(exchange, jobs)


def test_ranks_that_start_different_exchanges_are_an_error() -> None:
    jobs = make_jobs(QSGD(), make_inputs(2))
    with pytest.raises(ExchangeError, match="different collectives"):
        simulate([EXCHANGES["allgather"](jobs[0]), EXCHANGES["scatter_gather"](jobs[1])])


def test_a_rank_that_ends_early_is_an_error() -> None:
    def asks_twice() -> Any:
        yield AllGather("a", np.zeros(1, np.uint8))
        yield AllGather("b", np.zeros(1, np.uint8))

    def asks_once() -> Any:
        yield AllGather("a", np.zeros(1, np.uint8))

    with pytest.raises(ExchangeError, match="different collectives"):
        simulate([asks_twice(), asks_once()])


@pytest.mark.parametrize(("exchange", "collective"), [("allgather", 0), ("scatter_gather", 0), ("allreduce", 0)])
def test_a_flipped_bit_in_a_fingerprint_is_an_error(exchange: str, collective: int) -> None:
    def change(outcome: Any) -> Any:
        return (flip_bit(outcome[0], 5), outcome[1]) if isinstance(outcome, tuple) else flip_bit(outcome, 5)

    jobs = make_jobs(QSGD(), make_inputs(4))
    with pytest.raises(ExchangeError, match="Rank 2, exchange 'job'"):
        run_exchange(exchange, jobs, tamper=(2, collective, change))
