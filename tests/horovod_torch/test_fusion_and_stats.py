"""Which collectives run, and what the compressor reports about them."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import SHAPE, assert_equal, reference_allgather
from rank_checks import backward, dyadic, gather, make_gradients, make_optimizer, make_parameters, train

from hvd_qsgd import QSGD, TopK
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.torch import CastCompressor, QSGDCompressor, TopKCompressor
from hvd_qsgd.torch.compressor import IN_FLIGHT
from hvd_qsgd.torch.flights import ENGINE

RANKS = hvd.size()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the collectives that compressors start for gradients."""
    names: list[str] = []
    start = HorovodCollectives.start

    def listed(self: HorovodCollectives, request: Any) -> Any:
        # The question whether settings agree is asked once for each optimizer, not for each step.
        if ".settings." not in request.name:
            names.append(request.name)
        return start(self, request)

    monkeypatch.setattr(HorovodCollectives, "start", listed)
    return names


@pytest.mark.parametrize(("exchange", "phases"), [("allgather", 1), ("scatter_gather", 2), ("allreduce", 2)])
def test_many_small_tensors_travel_as_one(started: list[str], exchange: str, phases: int) -> None:
    parameters = make_parameters({f"layer{i}.weight": (32, 40) for i in range(30)})
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange=exchange))
    train(optimizer, parameters, range(2))
    assert len(started) == 2 * phases


@pytest.mark.parametrize(
    ("limit", "exchanges"),
    # Buckets of 512 in 20 tensors of 1280 elements: 3840 hold three tensors, and 512 one bucket.
    [(20 * 1280, 1), (10 * 1280, 2), (3840, 7), (512, 20 * 3)],
)
def test_bundles_are_as_large_as_asked(started: list[str], limit: int, exchanges: int) -> None:
    parameters = make_parameters({f"layer{i}.weight": (32, 40) for i in range(20)})
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather", fusion_elements=limit))
    raw = make_gradients(parameters)
    backward(parameters, raw)
    optimizer.synchronize()
    assert len(started) == len(set(started)) == exchanges
    for name, parameter in parameters.items():
        assert_equal(parameter.grad, reference_allgather(QSGD(), gather(raw[name]), f"{name}", 0))


@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
def test_a_large_tensor_travels_in_parts(started: list[str], exchange: str) -> None:
    x = dyadic((100, 101))
    whole, parts = (QSGDCompressor(exchange=exchange, fusion_elements=n) for n in (1 << 20, 4096))
    expected = hvd.allreduce(x, name="x", compression=whole)
    phases = len(started)
    result = hvd.allreduce(x, name="x", compression=parts)
    assert len(started) - phases == 3 * phases
    if exchange != "scatter_gather":
        # There other ranks own the buckets, and draw other words for the second rounding.
        assert_equal(result, expected)


@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
def test_few_parts_of_a_tensor_are_under_way_at_once(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    submit = ENGINE.submit

    def counted(*arguments: Any) -> Any:
        under_way.append(sum(not task.finished for task in ENGINE._tasks))
        return submit(*arguments)

    monkeypatch.setattr(ENGINE, "submit", counted)
    hvd.allreduce(dyadic((100, 101)), name="x", compression=QSGDCompressor(exchange=exchange, fusion_elements=512))
    assert len(under_way) == 20 and max(under_way) <= IN_FLIGHT


def test_selections_are_never_cut(started: list[str]) -> None:
    x = dyadic((100, 101))
    compressor = TopKCompressor(fusion_elements=4096, error_feedback=False)
    result = hvd.allreduce(x, name="x", compression=compressor)
    assert_equal(result, reference_allgather(TopK(), gather(x), "x", 0))
    assert len(started) == 1


def aligned(size: int) -> int:
    return -(-size // 4) * 4


def wire_allgather(codec: QSGD, length: int) -> float:
    """A ring passes on n-1 messages: each a fingerprint, the size and the payload."""
    return (RANKS - 1) * (8 + aligned(codec.payload_size(length)))


def wire_scatter_gather(codec: QSGD, length: int) -> float:
    """The other ranks' shards go out, and come back as means by a ring; each with a fingerprint."""
    buckets = -(-length // codec.bucket_size)
    cuts = [min(buckets * r // RANKS * codec.bucket_size, length) for r in range(RANKS)] + [length]
    shards = [4 + aligned(codec.payload_size(b - a)) for a, b in zip(cuts, cuts[1:], strict=False)]
    own = shards[hvd.rank()]
    return 2 * (sum(shards) - own)


def wire_allreduce(codec: QSGD, length: int) -> float:
    """A ring passes twice (n-1)/n of all words: two of agreement and the scales, a counter and the lanes."""
    words = 2 + codec.buckets(length) + 1 + codec.lanes_length(length, RANKS)
    return 2 * (RANKS - 1) / RANKS * 4 * words


WIRE = {"allgather": wire_allgather, "scatter_gather": wire_scatter_gather, "allreduce": wire_allreduce}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
def test_stats(exchange: str, dtype: torch.dtype) -> None:
    codec, x, bias = QSGD(), dyadic(SHAPE).to(dtype), dyadic((100,)).to(dtype)
    compressor = QSGDCompressor(exchange=exchange)
    assert compressor.stats().ratio == 1.0
    for _ in range(3):
        hvd.allreduce(x, name="x", compression=compressor)
        hvd.allreduce(bias, name="bias", compression=compressor)
    stats = compressor.stats()
    sent, left = stats.tensors["x"], stats.tensors["bias"]
    ring = 2 * (RANKS - 1) / RANKS
    assert (sent.elements, sent.exchanges, sent.exchange, sent.bypassed) == (x.numel(), 3, exchange, "")
    assert sent.raw_bytes == 3 * x.numel() * x.element_size()
    if exchange != "allreduce":
        # Each shard of scatter_gather begins with a bucket, so the parts are as large as the whole.
        assert sent.payload_bytes == 3 * codec.payload_size(x.numel())
    assert sent.wire_bytes == pytest.approx(3 * WIRE[exchange](codec, x.numel()))
    assert sent.uncompressed_wire_bytes == pytest.approx(ring * sent.raw_bytes)
    assert (left.exchanges, left.exchange, left.bypassed) == (3, "", "1 dimensions are fewer than min_dims=2")
    assert left.raw_bytes == left.payload_bytes == 300 * x.element_size()
    assert left.wire_bytes == left.uncompressed_wire_bytes == pytest.approx(ring * left.raw_bytes)
    assert stats.raw_bytes == sent.raw_bytes + left.raw_bytes
    assert stats.wire_bytes == pytest.approx(sent.wire_bytes + left.wire_bytes)
    assert stats.ratio == pytest.approx(ring * stats.raw_bytes / stats.wire_bytes)
    assert stats.as_dict()["tensors"]["x"]["wire_bytes"] == sent.wire_bytes
    assert "1 dimensions are fewer" in str(stats)
    compressor.reset()
    assert not compressor.stats().tensors


def test_reasons_of_a_bypass() -> None:
    compressor = CastCompressor(min_elements=500)
    for name, tensor in {
        "whole": torch.ones(50, 50, dtype=torch.int32),
        "flat": torch.ones(5000),
        "small": torch.ones(20, 20),
        "sent": torch.ones(20, 30),
    }.items():
        hvd.allreduce(tensor, name=name, compression=compressor)
    assert compressor.stats().bypassed == {
        "whole": "dtype int32 is not a floating-point type",
        "flat": "1 dimensions are fewer than min_dims=2",
        "small": "400 elements are fewer than min_elements=500",
    }


def test_stats_of_fused_tensors_add_up() -> None:
    lengths = [32 * 40] * 10
    parameters = make_parameters({f"layer{i}.weight": (32, 40) for i in range(10)})
    compressor = QSGDCompressor(exchange="allgather")
    train(make_optimizer(parameters, compressor), parameters, range(2))
    stats = compressor.stats()
    assert set(stats.tensors) == {f"{name}" for name in parameters}
    assert stats.payload_bytes == 2 * sum(QSGD().payload_size(length) for length in lengths)
    message = 4 * (1 + len(lengths)) + sum(aligned(QSGD().payload_size(length)) for length in lengths)
    assert stats.wire_bytes == pytest.approx(2 * (RANKS - 1) * message)


def test_stats_of_selections() -> None:
    """Sparse selections vary in size; the report is of what really went out."""
    compressor = TopKCompressor(ratio=0.02, error_feedback=False)
    x = dyadic(SHAPE)
    hvd.allreduce(x, name="x", compression=compressor)
    sizes = [len(TopK(ratio=0.02).encode(other.numpy().reshape(-1))) for other in gather(x)]
    record = compressor.stats().tensors["x"]
    assert record.payload_bytes == sizes[hvd.rank()]
    # A ring passes on all messages but one; each rank counts all but its own.
    assert record.wire_bytes == sum(8 + aligned(size) for size in sizes) - 8 - aligned(sizes[hvd.rank()])
