"""exchange="auto": the first steps go uncompressed, then all ranks do the same."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal, assert_within_a_level
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
from hvd_qsgd.torch import QSGDCompressor, TopKCompressor
from hvd_qsgd.tuning.cost import COLLECTIVES, UNCOMPRESSED, Costs
from hvd_qsgd.tuning.warm_up import REHEARSALS

SHAPES = {"first": (40, 50), "bias": (50,), "second": (30, 40)}
SLOW = Costs(1e-3, 0.0, dict.fromkeys(COLLECTIVES, 1e-3), 1e-9, 1e-9, 1e-9)
FAST = Costs(1e-3, 0.0, dict.fromkeys(COLLECTIVES, 1e-12), 1e-9, 1e-9, 1e-9)


def assume(monkeypatch: pytest.MonkeyPatch, costs: Costs) -> None:
    """Let what is measured be ``costs``."""

    def measured(*_: Any) -> Any:
        return costs
        yield

    monkeypatch.setattr("hvd_qsgd.tuning.auto.measure_costs", measured)


def assert_all_ranks_say(text: str) -> None:
    assert_same_on_all_ranks([torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)[:64]])


@pytest.mark.parametrize("groups", [None, 1])
def test_a_real_measurement(groups: int | None) -> None:
    parameters = make_parameters(SHAPES)
    compressor = QSGDCompressor(exchange="auto")
    optimizer = make_optimizer(parameters, compressor, groups=groups)
    for step in range(REHEARSALS + 2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        for name, parameter in parameters.items():
            if step < REHEARSALS or name == "bias":
                assert_equal(parameter.grad, torch.stack(gather(raw[name])).mean(0))
            else:
                assert_within_a_level(QSGD(), parameter.grad, gather(raw[name]), roundings=2)
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        apply_gradients(optimizer)
    decisions = compressor.stats().decisions
    assert list(decisions) == ["optimizer 0"] and "predicted: none" in decisions["optimizer 0"]
    assert decisions["optimizer 0"] in str(compressor.stats())
    assert_all_ranks_say(decisions["optimizer 0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("costs", [SLOW, FAST], ids=["slow", "fast"])
def test_it_does_what_it_decided(monkeypatch: pytest.MonkeyPatch, costs: Costs, dtype: torch.dtype) -> None:
    assume(monkeypatch, costs)
    parameters = make_parameters(SHAPES, dtype)
    compressor = QSGDCompressor(exchange="auto")
    optimizer = make_optimizer(parameters, compressor)
    for step in range(REHEARSALS + 2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        if costs is FAST or step < REHEARSALS:
            check_gradients(parameters, raw, QSGD(), step, bypassed=SHAPES)
        elif hvd.size() < 4:
            # The random words are those of the compressed steps.
            check_gradients(parameters, raw, QSGD(), step - REHEARSALS)
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        apply_gradients(optimizer)
    exchange = compressor.stats().tensors["first"].exchange
    assert exchange == ("" if costs is FAST else "scatter_gather" if hvd.size() >= 4 else "allgather")
    assert ("compression is off" in compressor.stats().decisions["optimizer 0"]) == (costs is FAST)
    assert ("first" in compressor.stats().bypassed) == (costs is FAST)


def test_it_decides_anew_after_replan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have come to an elastic job know nothing of what was decided before."""
    parameters, x = make_parameters(SHAPES), dyadic((60, 60))
    compressor = QSGDCompressor(exchange="auto")
    optimizer = make_optimizer(parameters, compressor)
    for costs, decided in ((SLOW, False), (FAST, True)):
        assume(monkeypatch, costs)
        compressor.replan()
        for step in range(REHEARSALS + 1):
            reduce_gradients(optimizer, parameters, make_gradients(parameters, step))
            assert (compressor.stats().tensors["first"].exchange == "") == (decided or step < REHEARSALS)
            apply_gradients(optimizer)
        hvd.allreduce(x, name="x", compression=compressor)
        for what in ("optimizer 0", "x"):
            assert ("compression is off" in compressor.stats().decisions[what]) == decided


def test_error_feedback_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is decided, the first steps leave no residual that later ones would have to carry."""
    for costs in (SLOW, FAST):
        assume(monkeypatch, costs)
        parameters = make_parameters(SHAPES)
        compressor = TopKCompressor(0.1, exchange="auto")
        optimizer = make_optimizer(parameters, compressor)
        for step in range(REHEARSALS):
            reduce_gradients(optimizer, parameters, make_gradients(parameters, step))
            assert not compressor.state_dict()["arrays"]
            apply_gradients(optimizer)
        reduce_gradients(optimizer, parameters, make_gradients(parameters, 9))
        apply_gradients(optimizer)
        assert len(compressor.state_dict()["arrays"]) == (2 if costs is SLOW else 0)


def test_allreduce_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assume(monkeypatch, SLOW)
    compressor = QSGDCompressor(exchange="auto")
    x, y = dyadic((60, 60)), dyadic((2, 600))
    for _ in range(2):
        result = hvd.allreduce(x, name="x", compression=compressor)
        assert_within_a_level(QSGD(), result, gather(x), roundings=2)
        assert_same_on_all_ranks([result])
    assume(monkeypatch, FAST)
    fast = QSGDCompressor(exchange="auto")
    assert_equal(hvd.allreduce(y, name="y", compression=fast), torch.stack(gather(y)).mean(0))
    assert compressor.stats().decisions["x"] and UNCOMPRESSED in fast.stats().decisions["y"]
