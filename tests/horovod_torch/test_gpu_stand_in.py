"""Gradients on a GPU, as far as that can be shown without one: order between streams, and no waiting of the host."""

from __future__ import annotations

import functools
import gc
from typing import Any

import gpu_stand_in as stand_in
import horovod.torch as hvd
import pytest
import torch
from gpu_stand_in import WORLD, HostWaitsError, RaceError, Stream, far
from rank_checks import assert_same_on_all_ranks, backward, make_gradients, make_optimizer, make_parameters, normal

from hvd_qsgd import Codec, EliasQSGD, RowTopK, TopK
from hvd_qsgd.collectives import horovod_torch
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.exchanges import Job, Piece, allgather, start_exchange
from hvd_qsgd.exchanges.base import prepared
from hvd_qsgd.feedback import MomentumCorrection
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.torch import transfer
from hvd_qsgd.kernels.torch.topk import TopKKernels
from hvd_qsgd.reduction.progress import run_exchange
from hvd_qsgd.torch import (
    CastCompressor,
    DGCCompressor,
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    IdentityCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
    TopKCompressor,
    dgc,
    flights,
)
from hvd_qsgd.torch import compressor as compressor_module
from hvd_qsgd.torch import tensors as tensors_module
from hvd_qsgd.torch.flights import empty_on, kernels_on
from hvd_qsgd.torch.streams import bring, on_own_stream, own_stream
from hvd_qsgd.torch.tensors import flat

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
    "compressor",
    [
        SignCompressor,
        CastCompressor,
        IdentityCompressor,
        RandomKCompressor,
        PowerSGDCompressor,
        IntSGDCompressor,
        EliasQSGDCompressor,
        functools.partial(EliasQSGDCompressor, exchange="scatter_gather"),
        functools.partial(RowTopKCompressor, 0.1, 64),
        functools.partial(RowTopKCompressor, 0.1, 64, exchange="scatter_gather"),
        functools.partial(ThresholdTopKCompressor, 0.1),
        functools.partial(ThresholdTopKCompressor, 0.1, method="sample"),
        functools.partial(GlobalTopKCompressor, 0.1),
    ],
)
def test_other_codecs_do_not_make_the_host_wait_either(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [normal(SHAPE, seed) for seed in range(3)]
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


def hard_tensors() -> list[torch.Tensor]:
    """Of different lengths: fewer values than are kept, none, one that is not finite, one by the other rank only."""
    tensors = [normal((900 + 10 * seed,), seed) for seed in range(8)]
    tensors[1][5:] = 0
    tensors[2][:] = 0
    tensors[3][7] = float("nan")
    tensors[4][8] = float("inf") if hvd.rank() else 1.0
    tensors[5][hvd.rank() + 1 :] = 0
    return tensors


@pytest.mark.parametrize(
    ("path", "values", "ratio"),
    [("nccl", "float32", 0.1), ("nccl that ends early", "float16", 1.0), ("pinned memory", "float16", 0.1)],
)
def test_topk_of_tensors_of_any_kind_has_the_bits_of_the_cpu(
    path: str, values: str, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With error feedback, whose residuals are in what comes next."""

    def run(place: Any) -> list[torch.Tensor]:
        compressor = TopKCompressor(ratio, values=values, min_dims=1, min_elements=1)
        results = []
        for _ in range(2):
            named = [(f"x{i}", place(x)) for i, x in enumerate(hard_tensors())]
            results += [hvd.allreduce(x, name=name, compression=compressor) for name, x in named]
        return results

    expected = run(torch.clone)
    with stand_in.gpu(monkeypatch, nccl="nccl" in path, ends_early="early" in path):
        results = [result.inner for result in run(far)]
        gc.collect()
    for result, mean in zip(results, expected):
        assert torch.equal(result.isnan(), mean.isnan())
        assert torch.equal(result.nan_to_num(0.5), mean.nan_to_num(0.5))


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each look of the host at a device."""
    looks: list[int] = []

    class Counted(transfer.OnHost):
        def __init__(self, tensor: torch.Tensor) -> None:
            looks.append(len(tensor))
            super().__init__(tensor)

    monkeypatch.setattr(horovod_torch, "OnHost", Counted)
    return looks


def looks_at(codec: Codec, tensors: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the host looks at the device in one exchange of some tensors."""
    looks, collectives = count_looks(monkeypatch), HorovodCollectives()
    with stand_in.gpu(monkeypatch), on_own_stream(stand_in.DEVICE):
        pieces = [Piece(f"x{i}", far(x), far(0 * x), keep_error=True) for i, x in enumerate(tensors)]
        kernels, ranks = kernels_on(codec, stand_in.DEVICE), (collectives.rank, collectives.ranks)
        job = Job(f"{len(tensors)}", pieces, kernels, *ranks, empty_on(stand_in.DEVICE))
        run_exchange(start_exchange("allgather", job), collectives)
    return len(looks)


@pytest.mark.parametrize("codec", [TopK(0.1), RowTopK(0.1, 64), EliasQSGD()], ids=str)
def test_looks_at_the_device_do_not_grow_with_the_tensors(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [normal((900 + seed,), seed) for seed in range(20)]
    few, many = (looks_at(codec, tensors[:count], monkeypatch) for count in (1, 20))
    assert few == many <= 5


def test_a_wait_for_each_tensor_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both a wait that the stand-in sees, and looks of one tensor after the other."""
    tensors = [normal((900,), seed) for seed in range(3)]
    choose = TopKKernels.choose

    def careless(kernels: TopKKernels, x: torch.Tensor) -> Any:
        bool(x[0] > 0)
        return (yield from choose(kernels, x))

    def one_by_one(job: Job, several: Any) -> Any:
        results = []
        for looks in several:
            results += yield from prepared(job, [looks])
        return results

    with monkeypatch.context() as patch:
        patch.setattr(TopKKernels, "choose", careless)
        with pytest.raises(HostWaitsError):
            looks_at(TopK(0.1), tensors, monkeypatch)
    monkeypatch.setattr(allgather, "prepared", one_by_one)
    assert looks_at(TopK(0.1), tensors, monkeypatch) == 11


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: TopKCompressor(0.05, fusion_elements=3000), 0),
        (lambda: ThresholdTopKCompressor(0.05, fusion_elements=3000), 0),
        # Their norms are sums, in an order of torch's.
        (lambda: IntSGDCompressor(fusion_elements=3000), 1e-5),
        (lambda: DGCCompressor(0.05, clip=1.0, warm_up=(), fusion_elements=3000), 1e-5),
    ],
    ids=["TopK", "ThresholdTopK", "IntSGD", "DGC"],
)
def test_training_by_tensors_ends_as_by_arrays(make: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gradients on a device go through, with those of the CPU, over the hooks that the stand-in does not see.

    The host looks, so that collectives start later; still all ranks number alike what has no name.
    """
    looks = count_looks(monkeypatch)

    def trained() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parameters = make_parameters({f"p{i}": (40, 30 + i) for i in range(6)})
        compressor = make()
        optimizer = make_optimizer(parameters, compressor)
        for seed in range(4):
            optimizer.zero_grad()
            backward(parameters, make_gradients(parameters, seed))
            hvd.allreduce(torch.ones(1))
            optimizer.step()
        assert_same_on_all_ranks(parameters.values())
        return list(parameters.values()), [torch.as_tensor(a) for a in compressor.state_dict()["arrays"].values()]

    expected, expected_memory = trained()
    assert not looks
    monkeypatch.setattr(
        flights, "empty_on", lambda device: lambda length, dtype: torch.empty(length, dtype=getattr(torch, dtype))
    )
    for module in (flights, compressor_module):
        monkeypatch.setattr(module, "kernels_on", lambda codec, device: kernels_for(codec, "torch"))
    for module in (compressor_module, dgc):
        monkeypatch.setattr(module, "array_of", lambda tensor: flat(tensor).to(torch.float32))
    weights, memory = trained()
    assert looks
    for found, other in zip([*weights, *memory], [*expected, *expected_memory]):
        assert torch.allclose(found, other, rtol=tolerance, atol=tolerance)


def test_what_must_wait_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIDCo's fits take as many numbers as stages, one after the other."""
    with stand_in.gpu(monkeypatch), pytest.raises(HostWaitsError):
        averages(ThresholdTopKCompressor(0.1, method="sidco-gamma"), [far(normal(SHAPE))])


def test_momentum_correction_clips_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal((100,))
    for clip in (0.5, 1000.0):
        expected = MomentumCorrection(clip=clip).correct("x", x.numpy(), 2)
        with stand_in.gpu(monkeypatch):
            (clipped,) = [MomentumCorrection(clip=clip).correct("x", far(x), 2).inner]
        assert torch.allclose(clipped, torch.from_numpy(expected), rtol=1e-6)
        assert (clipped.norm() < 0.4) == (clip < 1)


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
