"""hvd.allreduce and hvd.grouped_allreduce with compression=, against the references in rank_checks.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import REFERENCES, SHAPE, assert_equal, assert_within_a_level, reference_allgather
from rank_checks import assert_same_on_all_ranks, by_ranks, dyadic, gather, normal

from hvd_qsgd import QSGD, Cast, Identity, TopK
from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.torch import CastCompressor, Compressor, IdentityCompressor, QSGDCompressor, TopKCompressor
from hvd_qsgd.torch.tensors import carrier_for

FACTORS = [
    ({}, 1.0),
    ({"op": hvd.Average}, 1.0),
    ({"op": hvd.Sum}, hvd.size()),
    ({"average": False}, hvd.size()),
    ({"prescale_factor": 0.25}, 0.25),
    ({"postscale_factor": 3.0}, 3.0),
    ({"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 8.0}, 4.0 * hvd.size()),
]


def check(compressor: Compressor, exchange: str, x: torch.Tensor, name: str, step: int, seed: int = 0) -> None:
    """One allreduce of ``x``: the input untouched, the result as specified, and the same everywhere."""
    before = x.clone()
    result = hvd.allreduce(x, name=name, compression=compressor)
    assert_equal(x, before)
    assert result.dtype == x.dtype
    expected = torch.from_numpy(REFERENCES[exchange](compressor.policy.only, gather(x), name, step, seed)).to(x.dtype)
    assert_equal(result, expected)
    assert_same_on_all_ranks([result])


@pytest.mark.parametrize("exchange", REFERENCES)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_quantization(bits: int, norm: str, exchange: str) -> None:
    compressor = QSGDCompressor(bits, norm=norm, exchange=exchange, error_feedback=False)
    for step in range(2):
        check(compressor, exchange, normal(SHAPE, seed=bits + step), "x", step)


@pytest.mark.parametrize(
    ("exchange", "roundings"), [("allgather", 1), ("scatter_gather", 2), ("allreduce", 1), ("by_ranks", 2)]
)
def test_the_error_is_below_a_level_for_each_rounding(exchange: str, roundings: int) -> None:
    x = normal(SHAPE)
    result = hvd.allreduce(x, name="x", compression=QSGDCompressor(exchange=exchange))
    assert_within_a_level(QSGD(), result, gather(x), roundings)


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [
        (QSGDCompressor(), by_ranks(QSGD())),
        (QSGDCompressor(8, bucket_size=64), by_ranks(QSGD())),
        (QSGDCompressor(3, bucket_size=65536), by_ranks(QSGD())),
        (QSGDCompressor(rounding="nearest", error_feedback=False), by_ranks(QSGD())),
        (QSGDCompressor(fusion_elements=1000, exchange="allgather"), "allgather"),
        (QSGDCompressor(fusion_elements=1000, exchange="allreduce"), "allreduce"),
        (TopKCompressor(error_feedback=False), "allgather"),
        (TopKCompressor(k=7, values="float16", error_feedback=False), "allgather"),
        (IdentityCompressor(), by_ranks(Identity())),
        (IdentityCompressor(exchange="allgather"), "allgather"),
        (CastCompressor(), by_ranks(Cast())),
        (CastCompressor("bfloat16", exchange="allgather"), "allgather"),
    ],
    ids=repr,
)
def test_codecs_and_settings(compressor: Compressor, exchange: str) -> None:
    for step in range(2):
        check(compressor, exchange, normal(SHAPE, seed=step), "x", step)
        assert compressor.stats().tensors["x"].exchange == exchange


def test_identity_is_the_mean() -> None:
    x = normal(SHAPE)
    expected = sum(gather(x)[1:], gather(x)[0]) / hvd.size()
    assert_equal(hvd.allreduce(x, name="x", compression=IdentityCompressor()), expected)


@pytest.mark.parametrize("kind", [QSGDCompressor, TopKCompressor, IdentityCompressor, CastCompressor])
def test_a_class_is_as_good_as_an_instance(kind: type[Compressor]) -> None:
    kind.reset()
    x = normal(SHAPE)
    results = [hvd.allreduce(x, name="x", compression=compression) for compression in (kind, kind())]
    assert_equal(*results)
    assert kind.stats().tensors["x"].exchanges == 1


def test_seeds_repeat_and_differ() -> None:
    x = normal(SHAPE)
    results = [hvd.allreduce(x, name="x", compression=QSGDCompressor(seed=seed)) for seed in (7, 7, 2**64 - 1)]
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    check(QSGDCompressor(seed=2**64 - 1), by_ranks(QSGD()), x, "x", 0, 2**64 - 1)


@pytest.mark.parametrize(("arguments", "factor"), FACTORS)
def test_operations_and_factors(arguments: dict[str, Any], factor: float) -> None:
    x = normal(SHAPE)
    mean = reference_allgather(QSGD(), gather(x), "x", 0)
    compressor = QSGDCompressor(exchange="allgather")
    assert_equal(hvd.allreduce(x, name="x", compression=compressor, **arguments), torch.from_numpy(mean) * factor)


@pytest.mark.parametrize(("arguments", "factor"), FACTORS)
def test_groups_with_operations_and_factors(arguments: dict[str, Any], factor: float) -> None:
    tensors = [normal(SHAPE), dyadic((30,), 1), normal((64, 32), 2), normal((2, 3, 400), 3)]
    compressor = QSGDCompressor(exchange="allgather")
    for step in range(2):
        results = hvd.grouped_allreduce(tensors, name="group", compression=compressor, **arguments)
        for i in (0, 2, 3):
            mean = torch.from_numpy(reference_allgather(QSGD(), gather(tensors[i]), f"group.{i}", step))
            assert_equal(results[i], mean * factor)
        assert_equal(results[1], hvd.allreduce(tensors[1], name="bypassed", **arguments))
        assert_same_on_all_ranks(results)
    assert set(compressor.stats().bypassed) == {"group.1"}


def test_what_has_no_name() -> None:
    compressor = QSGDCompressor(exchange="allgather")
    # The second has the first one's shape, so it draws the words of the next step.
    for step, x in enumerate([normal(SHAPE), normal(SHAPE, 1)]):
        result = hvd.allreduce(x, compression=compressor)
        assert_equal(result, reference_allgather(QSGD(), gather(x), "unnamed.71x73.float32", step))
    pair = [x, x.t()]
    for tensor, result in zip(pair, hvd.grouped_allreduce(pair, compression=compressor), strict=True):
        assert_within_a_level(QSGD(), result, gather(tensor))


def test_error_feedback_without_a_name() -> None:
    with pytest.raises(UnsupportedError, match="without a name"):
        hvd.allreduce(dyadic(SHAPE), compression=TopKCompressor)
    with pytest.raises(UnsupportedError, match="without a name"):
        hvd.grouped_allreduce([dyadic(SHAPE)], compression=TopKCompressor)


@pytest.mark.parametrize("exchange", REFERENCES)
def test_what_has_no_name_on_a_rank_that_is_slow(monkeypatch: pytest.MonkeyPatch, exchange: str) -> None:
    # Horovod names what has no name after the number of collectives so far, of ours as well.
    def late(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1 * hvd.rank())
        return carrier_for(*arguments)

    monkeypatch.setattr("hvd_qsgd.torch.compressor.carrier_for", late)
    compressor = QSGDCompressor(exchange=exchange)
    for x in (normal(SHAPE), normal(SHAPE, 1)):
        assert_within_a_level(QSGD(), hvd.allreduce(x, compression=compressor), gather(x), roundings=2)
        for result in hvd.grouped_allreduce([x, x + 1], compression=compressor):
            assert result.isfinite().all()


@pytest.mark.parametrize(
    "tensor",
    [
        dyadic((5000,)),
        dyadic((31, 33)),
        dyadic((1023, 1)),
        torch.tensor(float(hvd.rank())),
        dyadic((5000,)).double(),
        dyadic((30, 30)).half(),
        torch.arange(6000).view(60, 100) + hvd.rank(),
        (torch.arange(6000).view(60, 100) * hvd.rank()).int(),
    ],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}",
)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_what_is_small_or_flat_or_whole_goes_through_horovod(tensor: torch.Tensor, op: Any) -> None:
    compressor = QSGDCompressor()
    result = hvd.allreduce(tensor, name="x", op=op, compression=compressor)
    expected = hvd.allreduce(tensor, name="x", op=op)
    assert result.dtype == expected.dtype
    assert_equal(result, expected)
    assert set(compressor.stats().bypassed) == {"x"}


def test_bfloat16_that_is_not_compressed() -> None:
    x = dyadic((100,)).bfloat16()
    result = hvd.allreduce(x, name="x", compression=QSGDCompressor)
    assert result.dtype == torch.bfloat16
    assert_equal(result, hvd.allreduce(x.float(), name="x").bfloat16())


def test_thresholds_can_be_moved() -> None:
    compressor = QSGDCompressor(min_elements=1, min_dims=0, exchange="allgather")
    for step, x in enumerate([normal((700,)), normal((3,)), torch.tensor(1.5 + hvd.rank())]):
        check(compressor, "allgather", x, "x", step)
    assert not compressor.stats().bypassed


@pytest.mark.parametrize("exchange", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, exchange: str) -> None:
    check(QSGDCompressor(exchange=exchange), exchange, normal(SHAPE).to(dtype), "x", 0)
    check(QSGDCompressor(exchange=exchange), exchange, normal((8, 2, 4, 30)).to(dtype), "x", 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1:],
        lambda x: x[:1].expand(71, 73),
        lambda x: x[:, :72].reshape(71, 2, 6, 6).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "channels_last"],
)
def test_memory_formats(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(normal(SHAPE))
    assert not x.is_contiguous()
    check(QSGDCompressor(exchange="allgather"), "allgather", x, "x", 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exchange", REFERENCES)
def test_what_is_not_finite_spoils_its_bucket_on_all_ranks(exchange: str, value: float) -> None:
    x = normal(SHAPE)
    if hvd.rank() == 1:
        x.view(-1)[600] = value
    result = hvd.allreduce(x, name="x", compression=QSGDCompressor(exchange=exchange))
    assert_same_on_all_ranks([result])
    spoiled = torch.zeros(x.numel(), dtype=torch.bool)
    spoiled[512:1024] = True
    assert_equal(result.isnan().view(-1), spoiled)
    assert_equal(result, REFERENCES[exchange](QSGD(), gather(x), "x", 0))


def test_float64_beyond_float32_is_not_finite() -> None:
    x = normal(SHAPE).double()
    x[0, 0] = 1e300
    result = hvd.allreduce(x, name="x", compression=QSGDCompressor())
    assert int(result.isnan().sum()) == 512


def test_sparse_selection_that_is_not_finite_spoils_its_tensor() -> None:
    x = normal(SHAPE)
    if hvd.rank() == 0:
        x[5, 5] = float("inf")
    results = hvd.grouped_allreduce([x, normal(SHAPE)], name="x", compression=TopKCompressor(error_feedback=False))
    assert results[0].isnan().all()
    assert_equal(results[1], reference_allgather(TopK(), gather(normal(SHAPE)), "x.1", 0))


@pytest.mark.parametrize("rows", [4, 64])
def test_what_horovod_cannot_reduce_is_refused_in_its_words(rows: int) -> None:
    ones = torch.ones(rows, 64)
    for tensor in (ones.to_sparse(), ones.to(torch.complex64), ones.to(torch.bool)):
        for compression in (hvd.Compression.none, QSGDCompressor(), TopKCompressor()):
            with pytest.raises(ValueError, match=r"^Tensor type torch\.\S+ is not supported\."):
                hvd.allreduce(tensor, name="refused", compression=compression)
