"""Optimizers and allreduces of some of the ranks.

Horovod numbers what has no name, on each rank by itself: after these tests, ranks no longer agree on the numbers. So
no test that comes later may use a collective without a name.
"""

from __future__ import annotations

from typing import Any

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
from hvd_qsgd.errors import UnsupportedError
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


def step_in(process_set: Any, compressor: Any, name: str) -> None:
    """A step of a new optimizer of a process set, if this rank is in it."""
    if process_set.included():
        parameters = make_parameters({name: (40, 50)})
        optimizer = make_optimizer(parameters, compressor, process_set=process_set)
        raw = make_gradients(parameters)
        reduce_gradients(optimizer, parameters, raw)
        assert_within_a_level(QSGD(), parameters[name].grad, gather(raw[name], process_set), roundings=2)
        apply_gradients(optimizer)


def test_ranks_that_have_made_other_numbers_of_optimizers() -> None:
    compressor = QSGDCompressor(exchange="allgather")
    some = hvd.add_process_set(list(range(hvd.size() - 1)))
    step_in(some, compressor, "of.some")
    step_in(hvd.global_process_set, compressor, "of.all")
    step_in(some, compressor, "of.some.again")
    hvd.barrier()
    hvd.remove_process_set(some)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("exchange", ["allgather", "auto"])
def test_an_id_that_is_given_again(exchange: str) -> None:
    """Horovod gives the id of a process set that was removed to the next one, which may be of other ranks."""
    compressor = QSGDCompressor(exchange=exchange)
    ids = []
    for members in ([0, 1], [2, 3], [0, 2], [1, 3], [0, 1]):
        pair = hvd.add_process_set(members)
        ids.append(pair.process_set_id)
        if pair.included():
            x = dyadic((60, 60))
            for _ in range(2):
                result = hvd.allreduce(x, name="x", compression=compressor, process_set=pair)
                (of_group,) = hvd.grouped_allreduce([x], name="x", compression=compressor, process_set=pair)
                for each in (result, of_group):
                    assert_within_a_level(QSGD(), each, gather(x, pair), roundings=2)
        hvd.barrier()
        hvd.remove_process_set(pair)
    assert len(set(ids)) < len(ids)
    # Nothing is kept of sets that are gone, but of the last one.
    assert len({key[0] for key in compressor._single}) <= 1
    with pytest.raises(UnsupportedError, match="has been removed"):
        hvd.allreduce(dyadic((60, 60)), name="x", compression=compressor, process_set=pair)


def test_a_set_that_is_added_again() -> None:
    some = hvd.ProcessSet(list(range(hvd.size() - 1)))
    others = [hvd.ProcessSet([rank]) for rank in range(1, hvd.size())]
    compressor, parameters = QSGDCompressor(exchange="allgather"), make_parameters({"again": (40, 50)})
    optimizer = None
    for sets in ([some], [*others, some]):
        for process_set in sets:
            hvd.add_process_set(process_set)
        if some.included():
            optimizer = optimizer or make_optimizer(parameters, compressor, process_set=some)
            reduce_gradients(optimizer, parameters, make_gradients(parameters))
            apply_gradients(optimizer)
            hvd.allreduce(dyadic((60, 60)), name="x", compression=compressor, process_set=some)
            assert_same_on_all_ranks(parameters.values(), some)
        hvd.barrier()
        for process_set in sets:
            hvd.remove_process_set(process_set)
