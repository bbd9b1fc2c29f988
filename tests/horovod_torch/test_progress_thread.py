"""A thread that goes on with exchanges while the backward pass runs."""

from __future__ import annotations

import random
import time

import horovod.torch as hvd
import pytest
import torch
from rank_checks import (
    apply_gradients,
    assert_equal,
    assert_same_on_all_ranks,
    backward,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
)

from hvd_qsgd import ExchangeError
from hvd_qsgd.collectives.horovod_torch import HorovodHandle
from hvd_qsgd.torch import QSGDCompressor
from hvd_qsgd.torch.flights import ENGINE

SHAPES = {f"layer{i}.weight": (40, 64) for i in range(6)}


def compressor(exchange: str, thread: bool) -> QSGDCompressor:
    return QSGDCompressor(exchange=exchange, fusion_elements=4096, progress_thread=thread)


def idle(seconds: float = 20) -> bool:
    """Whether all that is under way ends although nobody waits for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(task.finished for task in ENGINE._tasks) and ENGINE._thread is None:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("exchange", ["allgather", "scatter_gather", "allreduce"])
def test_exchanges_end_before_anybody_waits(exchange: str) -> None:
    for thread in (True, False):
        parameters = make_parameters(SHAPES)
        optimizer = make_optimizer(parameters, compressor(exchange, thread))
        backward(parameters, make_gradients(parameters))
        assert len(ENGINE._tasks) >= 3
        assert idle(20 if thread else 0.5) == thread
        optimizer.synchronize()


@pytest.mark.parametrize("exchange", ["allgather", "scatter_gather", "allreduce"])
def test_the_bits_are_those_without_it(exchange: str) -> None:
    results = []
    for thread in (False, True):
        parameters = make_parameters(SHAPES)
        optimizer = make_optimizer(parameters, compressor(exchange, thread))
        for step in range(5):
            reduce_gradients(optimizer, parameters, make_gradients(parameters, step))
            apply_gradients(optimizer)
        results.append(torch.stack([p.detach() for p in parameters.values()]))
    assert_equal(*results)
    assert_same_on_all_ranks(results)


def test_ranks_whose_gradients_come_in_other_orders_and_at_other_times() -> None:
    generator = random.Random(hvd.rank())
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor("scatter_gather", True))
    for step in range(5):
        optimizer.zero_grad()
        named = list(make_gradients(parameters, step).items())
        generator.shuffle(named)
        for name, gradient in named:
            backward(parameters, {name: gradient})
            time.sleep(generator.choice([0, 0.01]))
        optimizer.step()
    assert_same_on_all_ranks(p.detach() for p in parameters.values())
    assert idle()


def test_an_error_in_the_thread_comes_where_the_gradient_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor("allgather", True))
    result = HorovodHandle.result

    def damaged(self: HorovodHandle) -> object:
        gathered = result(self)
        gathered[0] ^= 1
        return gathered

    monkeypatch.setattr(HorovodHandle, "result", damaged)
    backward(parameters, make_gradients(parameters))
    assert idle()
    monkeypatch.undo()
    with pytest.raises(ExchangeError, match="rank 0 sent something else"):
        optimizer.synchronize()
    hvd.barrier()
