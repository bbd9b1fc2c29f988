"""Gradients on a GPU, as far as that can be shown without one: order between streams, and no waiting of the host."""

from __future__ import annotations

import gc
from typing import Any

import gpu_stand_in as stand_in
import horovod.torch as hvd
import pytest
import torch
from gpu_stand_in import WORLD, HostWaitsError, RaceError, Stream, far
from rank_checks import normal

from hvd_qsgd.collectives import horovod_torch
from hvd_qsgd.torch import (
    CastCompressor,
    IdentityCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    RandomKCompressor,
    SignCompressor,
    TopKCompressor,
)
from hvd_qsgd.torch import compressor as compressor_module
from hvd_qsgd.torch import tensors as tensors_module
from hvd_qsgd.torch.streams import bring, on_own_stream, own_stream

EXCHANGES = ["allgather", "scatter_gather", "allreduce"]
SHAPE = (15, 100)


def averages(compressor: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [hvd.allreduce(tensor, name="x", compression=compressor) for tensor in tensors]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({}, "nccl"),
        ({"rounding": "nearest", "error_feedback": True}, "nccl that ends early"),
        ({}, "pinned memory"),
    ],
)
def test_results_are_those_of_the_cpu_without_a_race_and_the_host_does_not_wait(
    exchange: str, settings: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [normal(SHAPE, seed) for seed in range(2)]
    expected = averages(QSGDCompressor(exchange=exchange, **settings), inputs)
    with stand_in.gpu(monkeypatch, nccl="nccl" in path, ends_early="early" in path) as horovod:
        compressor = QSGDCompressor(exchange=exchange, **settings)
        for x, mean in zip(inputs, expected):
            with WORLD.stream(Stream()):  # of the backward pass
                tensor = far(x)
                result = hvd.allreduce(tensor, name="x", compression=compressor)
                doubled = result * 2  # on the current stream, and then the memory is free
            assert isinstance(doubled, stand_in.Far)
            assert torch.equal(doubled.inner, 2 * mean)
            del tensor, result, doubled
        assert bool(horovod.on_the_device) == ("nccl" in path)
        del compressor
        gc.collect()


@pytest.mark.parametrize(
    "compressor", [SignCompressor, CastCompressor, IdentityCompressor, RandomKCompressor, PowerSGDCompressor]
)
def test_other_codecs_do_not_make_the_host_wait_either(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [normal(SHAPE, seed) for seed in range(2)]
    expected = averages(compressor(), inputs)
    with stand_in.gpu(monkeypatch):
        results = averages(compressor(), [far(x) for x in inputs])
    for result, mean in zip(results, expected):
        assert torch.allclose(result.inner, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_and_written_without_a_float32_copy(
    exchange: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(SHAPE).to(dtype)
    (expected,) = averages(QSGDCompressor(exchange=exchange), [x])
    with stand_in.gpu(monkeypatch):
        for module in (compressor_module, tensors_module):
            monkeypatch.setattr(module, "array_of", None)
        (result,) = averages(QSGDCompressor(exchange=exchange), [far(x)])
        assert result.dtype == dtype and torch.equal(result.inner, expected)


def test_gradients_of_several_streams_are_all_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one bundle may come from streams that know nothing of each other."""
    with stand_in.gpu(monkeypatch):
        tensors = []
        for seed in range(3):
            with WORLD.stream(Stream()):
                tensors.append(far(normal(SHAPE, seed)))
                bring(tensors[-1])
        with on_own_stream(stand_in.DEVICE):
            torch.cat(tensors)
        with pytest.raises(RaceError):
            torch.cat(tensors)


def test_what_must_wait_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """TopK's payloads differ in size, and the host has to know the sizes."""
    with stand_in.gpu(monkeypatch), pytest.raises(HostWaitsError):
        averages(TopKCompressor(0.1), [far(normal(SHAPE))])


@pytest.mark.parametrize("forgotten", ["bring", "hand_back"])
def test_the_stand_in_finds_what_is_forgotten(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Feedback is in float32: what comes after the host's look at the exchange is the rounding to float16.
    compressor = QSGDCompressor(rounding="nearest", error_feedback=True)
    with stand_in.gpu(monkeypatch), WORLD.stream(Stream()):
        monkeypatch.setattr(compressor_module, forgotten, lambda tensor: None)
        with pytest.raises(RaceError):
            result = hvd.allreduce(far(normal(SHAPE).half()), name="x", compression=compressor)
            result + 1
        gc.collect()
        WORLD.faults.clear()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_stand_in_finds_that_a_collective_ends_early(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in.gpu(monkeypatch, ends_early=True), WORLD.stream(Stream()):
        monkeypatch.setattr(horovod_torch, "ends_early", lambda: False)
        with pytest.raises(RaceError):
            averages(QSGDCompressor(exchange=exchange), [far(normal(SHAPE))])


def test_the_stand_in_finds_memory_that_was_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(tensor: torch.Tensor) -> None:
        own_stream(tensor.device).wait_stream(torch.cuda.current_stream())

    with pytest.raises(AssertionError, match="memory was freed"), stand_in.gpu(monkeypatch), WORLD.stream(Stream()):
        monkeypatch.setattr(compressor_module, "bring", careless)
        averages(QSGDCompressor(), [far(normal(SHAPE))])
        gc.collect()


@pytest.mark.parametrize(
    "wait", [lambda x: x[0].item(), lambda x: bool(x[0] > 0), lambda x: x.cpu(), lambda x: x[x > 0]]
)
def test_the_stand_in_sees_that_the_host_waits(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in.gpu(monkeypatch), pytest.raises(HostWaitsError):
        wait(far(normal((8,))))
