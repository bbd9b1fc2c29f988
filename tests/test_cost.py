"""The cost model behind exchange="auto"."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from checkers import make_inputs, make_jobs, run_exchange, wrapper
from test_exchanges import EACH_PAIR

from hvd_qsgd import QSGD, Codec, EliasQSGD, Identity, ThresholdTopK, TopK
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import EXCHANGES, exchanges_for
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.tuning.cost import COLLECTIVES, MARGIN, UNCOMPRESSED, Costs, decide, measure_costs

MILLIONS = 25_000_000


def costs(gigabits: float, hop: float = 0.0) -> Costs:
    """A network of that bandwidth, and a machine of 0.7 ns to encode an element."""
    byte = 8e-9 / gigabits
    return Costs(1e-3, hop, dict.fromkeys(COLLECTIVES, byte), encode=0.7e-9, decode=0.4e-9, lanes=1.5e-9)


@EACH_PAIR
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_work_that_is_predicted_is_the_work_that_is_done(exchange: str, codec: Codec, ranks: int) -> None:
    length = 512 * 12 * ranks
    jobs = make_jobs(codec, make_inputs(ranks, (length,)))
    run_exchange(exchange, jobs)
    work = EXCHANGES[exchange].work(codec, length, ranks)
    if isinstance(codec, (EliasQSGD, ThresholdTopK)):
        # Their sizes have a bound, which is all that is known beforehand.
        assert jobs[0].wire_bytes <= sum(work.sent.values()) * 1.01
        return
    # But for headers and, in TopK, a size that depends on the values.
    assert jobs[0].wire_bytes == pytest.approx(sum(work.sent.values()), rel=0.2 if codec.variable_size else 0.01)


def test_slow_networks_are_compressed_for_and_fast_ones_are_not() -> None:
    for codec in (QSGD(), TopK()):
        slow, fast = (decide(costs(gigabits), codec, MILLIONS, 2, 12) for gigabits in (0.1, 400))
        assert slow.exchange in exchanges_for(codec) and fast.exchange == UNCOMPRESSED
        assert slow.predicted[slow.exchange] == min(slow.predicted.values())
    # What sends as many bytes and takes time besides is never worth it.
    assert all(decide(costs(g), Identity(), MILLIONS, 2, 12).exchange == UNCOMPRESSED for g in (0.01, 1, 100))
    # Nor when transfers hide behind the backward pass anyway.
    assert decide(costs(10), QSGD(), MILLIONS, 2, 12).exchange == "allgather"
    assert decide(costs(10), QSGD(), MILLIONS, 2, 12, hidden=1).exchange == UNCOMPRESSED
    # Nor is what gains less than the margin.
    barely = costs(0.1).predict("allgather", QSGD(), MILLIONS, 2) / costs(0.1).predict("none", QSGD(), MILLIONS, 2)
    assert barely < 1 - MARGIN


def test_predictions_by_hand() -> None:
    model = costs(1, hop=1e-4)
    # 2 (n-1)/n payloads of float32 at 125 MB/s, one collective among 4 ranks.
    assert model.predict("none", QSGD(), 10**6, 4) == pytest.approx(1.3e-3 + 6e6 / 125e6)
    payload = QSGD().payload_size(10**6)
    wire = 3 * payload / 125e6
    work = 10**6 * (0.7e-9 + 4 * 0.4e-9)
    assert model.predict("allgather", QSGD(), 10**6, 4) == pytest.approx(1.3e-3 + wire + work)
    assert model.predict("allgather", QSGD(), 10**6, 4, bundles=5) == pytest.approx(1.3e-3 + wire + work / 5)
    # Behind a backward pass, the first phase hides, and the codec does not.
    assert model.predict("none", QSGD(), 10**6, 4, hidden=0.01) == pytest.approx(1.3e-3 + 6e6 / 125e6 - 0.01)
    assert model.predict("none", QSGD(), 10**6, 4, hidden=1) == pytest.approx(1.3e-3)
    assert model.predict("allgather", QSGD(), 10**6, 4, hidden=1) == pytest.approx(1.3e-3 + work)
    halves = payload * 3 / 4 / 125e6
    codec = 10**6 * (0.7e-9 * 1.25 + 2 * 0.4e-9)
    for hidden, first in ((0, halves), (1, 0)):
        expected = 2.6e-3 + first + halves + codec / 8
        assert model.predict("scatter_gather", QSGD(), 10**6, 4, 8, hidden) == pytest.approx(expected)
    words = QSGD().lanes_length(10**6, 4) + QSGD().buckets(10**6)
    expected = 2.6e-3 + 1.5 * 4 * words / 125e6 + 1.5e-3 / 8
    assert model.predict("allreduce", QSGD(), 10**6, 4, 8, hidden=1) == pytest.approx(expected)
    assert model.predict("allgather", QSGD(), 0, 4) == model.predict("allgather", QSGD(), 10**6, 1) == 0


def test_exchanges_win_where_they_should() -> None:
    names = {ranks: decide(costs(1), QSGD(), MILLIONS, ranks, 12).exchange for ranks in (2, 64)}
    assert names == {2: "allgather", 64: "scatter_gather"}
    # Hundreds of short messages cost more than two long phases save.
    small = costs(10, hop=1e-3)
    assert small.predict("allgather", QSGD(), 10**4, 64) < small.predict("scatter_gather", QSGD(), 10**4, 64)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("codec", [QSGD(), TopK()], ids=str)
def test_all_ranks_agree_on_what_they_measure(ranks: int, backend: str, codec: Codec, monkeypatch: Any) -> None:
    monkeypatch.setattr("hvd_qsgd.tuning.cost.PROBE_BYTES", 1 << 12)
    monkeypatch.setattr("hvd_qsgd.tuning.cost.PROBE_ELEMENTS", 1 << 10)
    found: list[Costs] = []

    def rank() -> Generator[Any, Any, None]:
        steps = measure_costs(kernels_for(codec, backend), ranks, empty_of(backend), "costs")
        outcome = None
        try:
            while True:
                request = steps.send(outcome)
                # The simulated collectives know NumPy only.
                request.array = np.asarray(request.array)
                outcome = yield request
                if isinstance(outcome, np.ndarray):
                    outcome = wrapper(backend)(outcome)
        except StopIteration as stop:
            found.append(stop.value)

    simulate([rank() for _ in range(ranks)])
    assert len(found) == ranks and all(other == found[0] for other in found)
    assert found[0].start > 0 and found[0].encode > 0 and found[0].decode > 0
    assert set(found[0].byte) == set(COLLECTIVES) and min(found[0].byte.values()) > 0
    assert (found[0].lanes > 0) == ("allreduce" in exchanges_for(codec))


def empty_of(backend: str) -> Any:
    if backend == "numba":
        return np.empty
    import torch

    return lambda length, dtype: torch.empty(length, dtype=getattr(torch, dtype))
