"""Optimizers and allreduces of some of the ranks.

Horovod numbers what has no name, on each rank by itself: after these tests, ranks no longer agree on the numbers. So
no test that comes later may use a collective without a name.
"""

from __future__ import annotations

import horovod.torch as hvd
import pytest
from expectations import assert_within_a_level
from rank_checks import (
    apply_gradients,
    assert_same_on_all_ranks,
    check_gradients,
    dyadic,
    gather,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
)

from hvd_qsgd import QSGD
from hvd_qsgd.torch import QSGDCompressor


def check_process_set(members: list[list[int]]) -> None:
    """Disjoint sets train side by side, each on the mean of its own ranks."""
    process_sets = [hvd.add_process_set(ranks) for ranks in members]
    mine = next((s for s in process_sets if s.included()), None)
    try:
        if mine is not None:
            parameters = make_parameters({"first": (40, 50), "second": (30, 40)})
            optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"), process_set=mine)
            for step in range(2):
                raw = make_gradients(parameters, step)
                reduce_gradients(optimizer, parameters, raw)
                bypassed = set(parameters) if mine.size() == 1 else set()
                check_gradients(parameters, raw, QSGD(), step, bypassed=bypassed, process_set=mine)
                apply_gradients(optimizer)
            x = dyadic((60, 60))
            for exchange in ("by_ranks", "scatter_gather", "allreduce"):
                compressor = QSGDCompressor(exchange=exchange)
                result = hvd.allreduce(x, name="x", compression=compressor, process_set=mine)
                assert_within_a_level(QSGD(), result, gather(x, mine), roundings=2)
                assert_same_on_all_ranks([result], mine)
    finally:
        hvd.barrier()
        for process_set in process_sets:
            hvd.remove_process_set(process_set)


@pytest.mark.ranks(2)
def test_process_sets_of_one_rank() -> None:
    check_process_set([[0], [1]])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("members", [[[0, 2], [1, 3]], [[0, 1, 3]], [[1, 2], [3]]], ids=str)
def test_process_sets(members: list[list[int]]) -> None:
    check_process_set(members)
