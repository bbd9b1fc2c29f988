"""hvd.join(): ranks that have run out of data while others go on."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_within_a_level
from rank_checks import assert_same_on_all_ranks, backward, dyadic, make_gradients, make_optimizer, make_parameters

from hvd_qsgd import QSGD
from hvd_qsgd.errors import ExchangeError, UnsupportedError
from hvd_qsgd.torch import PowerSGDCompressor, QSGDCompressor, RandomKCompressor, TopKCompressor

STAYING = range(hvd.size() - 1)


def test_a_joined_rank_counts_as_zeros_like_in_plain_horovod() -> None:
    parameters = make_parameters({"first": (40, 50), "bias": (50,), "second": (30, 41)})
    optimizer = make_optimizer(parameters, QSGDCompressor(8, exchange="allreduce"))
    for step in range(3):
        if step == 1 and hvd.rank() not in STAYING:
            break
        optimizer.zero_grad()
        backward(parameters, make_gradients(parameters, step))
        optimizer.synchronize()
        ranks = range(hvd.size()) if step == 0 else STAYING
        raws = [make_gradients(parameters, step, rank) for rank in ranks]
        zeros = [torch.zeros(())] * (hvd.size() - len(ranks))
        for name, parameter in parameters.items():
            inputs = [raw[name] for raw in raws] + [zero.expand(parameter.shape) for zero in zeros]
            if name == "bias":
                torch.testing.assert_close(parameter.grad, torch.stack(inputs).mean(0))
            else:
                assert_within_a_level(QSGD(8), parameter.grad, inputs)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert hvd.join() in STAYING
    # Those that stayed have the same weights; the other one gets them by a broadcast.
    hvd.broadcast_parameters(parameters, root_rank=0)
    assert_same_on_all_ranks(parameters.values())


@pytest.mark.parametrize(
    "compressor",
    [QSGDCompressor(exchange="allgather"), QSGDCompressor(exchange="scatter_gather"), TopKCompressor()],
    ids=repr,
)
def test_gathering_with_a_joined_rank_is_refused(compressor: QSGDCompressor | TopKCompressor) -> None:
    # A name that is new: a gather that Horovod has seen before, it tries, and ends (see joined_gather.py).
    if hvd.rank() in STAYING:
        with pytest.raises(UnsupportedError, match='Use exchange="allreduce"'):
            hvd.allreduce(dyadic((40, 50)), name=f"new in {compressor}", compression=compressor)
    hvd.join()
    hvd.allreduce(dyadic((40, 50)), name="x", compression=QSGDCompressor())


@pytest.mark.parametrize("make", [lambda: RandomKCompressor(0.1), lambda: PowerSGDCompressor(2)], ids=["random", "low"])
def test_what_adds_up_common_draws_goes_on_after_a_reset_only(make: Any) -> None:
    """A rank that has joined misses steps, and would add up values of other positions."""
    compressor, name = make(), f"{make()}"
    steps = 3 if hvd.rank() in STAYING else 1
    for step in range(steps):
        mean = hvd.allreduce(dyadic((40, 50), step), name=name, compression=compressor)
        assert_same_on_all_ranks([mean]) if step == 0 else None
    hvd.join()
    with pytest.raises(ExchangeError, match=r"other steps behind them, as after hvd\.join\(\)"):
        hvd.allreduce(dyadic((40, 50), 3), name=name, compression=compressor)
    compressor.reset()
    assert_same_on_all_ranks([hvd.allreduce(dyadic((40, 50), 4), name=name, compression=compressor)])
