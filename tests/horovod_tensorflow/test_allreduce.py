"""hvd.allreduce and hvd.grouped_allreduce with compression=, against the references in expectations.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import REFERENCES, SHAPE, assert_equal, assert_within_a_level, reference_allgather
from rank_checks import MODES, assert_same_on_all_ranks, by_ranks, check_allreduces, dyadic, gather, normal

from hvd_qsgd import QSGD, Cast, Identity, TopK
from hvd_qsgd.tensorflow import CastCompressor, Compressor, IdentityCompressor, QSGDCompressor, TopKCompressor

FACTORS = [
    ({}, 1.0),
    ({"op": hvd.Sum}, hvd.size()),
    ({"average": False}, hvd.size()),
    ({"prescale_factor": 0.25}, 0.25),
    ({"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 8.0}, 4.0 * hvd.size()),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exchange", REFERENCES)
@pytest.mark.parametrize(("bits", "norm"), [(2, "max"), (4, "l2"), (7, "max"), (8, "max")])
def test_quantization(bits: int, norm: str, exchange: str, mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor(bits, norm=norm, exchange=exchange, error_feedback=False)
    check_allreduces(compressor, exchange, normal(SHAPE, bits), "x", range(2), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("make", "exchange"),
    [
        (QSGDCompressor, by_ranks(QSGD())),
        (lambda: QSGDCompressor(rounding="nearest", error_feedback=False), by_ranks(QSGD())),
        (lambda: QSGDCompressor(fusion_elements=1000, exchange="allgather"), "allgather"),
        (lambda: QSGDCompressor(fusion_elements=1000, exchange="allreduce"), "allreduce"),
        (lambda: TopKCompressor(k=7, values="float16", error_feedback=False), "allgather"),
        (IdentityCompressor, by_ranks(Identity())),
        (CastCompressor, by_ranks(Cast())),
        (lambda: CastCompressor("bfloat16", exchange="allgather"), "allgather"),
    ],
    ids=range(8),
)
def test_codecs_and_settings(make: Callable[[], Compressor], exchange: str, mode: Callable[..., Any]) -> None:
    compressor = make()
    check_allreduces(compressor, exchange, normal(SHAPE), "x", range(2), mode)
    assert compressor.stats().tensors["x"].exchange == exchange
    assert compressor.stats().tensors["x"].exchanges == 2


def test_eager_and_traced_calls_go_on_with_the_same_words() -> None:
    compressor = QSGDCompressor(exchange="allgather")
    check_allreduces(compressor, "allgather", normal(SHAPE), "x", range(2), MODES[0])
    check_allreduces(compressor, "allgather", normal(SHAPE), "x", range(2, 4), MODES[1])
    # Another shape traces the function anew.
    reduce = tf.function(lambda x: hvd.allreduce(x, name="x", compression=compressor))
    for shape, step in (((40, 50), 4), (SHAPE, 5), ((40, 50), 6)):
        result = reduce(tf.constant(normal(shape)))
        assert_equal(result, reference_allgather(QSGD(), gather(normal(shape)), "x", step))


@pytest.mark.parametrize("kind", [QSGDCompressor, TopKCompressor, IdentityCompressor, CastCompressor])
def test_a_class_is_as_good_as_an_instance(kind: type[Compressor]) -> None:
    kind.reset()
    x = tf.constant(normal(SHAPE))
    results = [hvd.allreduce(x, name="x", compression=compression) for compression in (kind, kind())]
    assert_equal(*results)
    assert kind.stats().tensors["x"].exchanges == 1


def test_seeds_repeat_and_differ() -> None:
    x = tf.constant(normal(SHAPE))
    results = [hvd.allreduce(x, name="x", compression=QSGDCompressor(seed=seed)) for seed in (7, 7, 2**64 - 1)]
    assert_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("arguments", "factor"), FACTORS)
def test_operations_and_factors(arguments: dict[str, Any], factor: float, mode: Callable[..., Any]) -> None:
    x = normal(SHAPE)
    compressor = QSGDCompressor(exchange="allgather")
    result = mode(lambda x: hvd.allreduce(x, name="x", compression=compressor, **arguments))(tf.constant(x))
    assert_equal(result, reference_allgather(QSGD(), gather(x), "x", 0) * np.float32(factor))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("arguments", "factor"), FACTORS)
def test_groups(arguments: dict[str, Any], factor: float, mode: Callable[..., Any]) -> None:
    tensors = [normal(SHAPE), dyadic((30,), 1), normal((64, 32), 2), normal((2, 3, 400), 3)]
    compressor = QSGDCompressor(exchange="allgather")
    group = mode(lambda *x: hvd.grouped_allreduce(list(x), name="group", compression=compressor, **arguments))
    for step in range(2):
        results = group(*map(tf.constant, tensors))
        for i in (0, 2, 3):
            mean = reference_allgather(QSGD(), gather(tensors[i]), f"group.{i}", step)
            assert_equal(results[i], mean * np.float32(factor))
        assert_equal(results[1], np.mean(gather(tensors[1]), axis=0) * factor)
        assert_same_on_all_ranks(results)
    assert set(compressor.stats().bypassed) == {"group.1"}


@pytest.mark.parametrize("kind", [np.asarray, tf.Variable])
def test_arrays_and_variables(kind: Any) -> None:
    x = dyadic(SHAPE)
    compressor = IdentityCompressor()
    assert_equal(hvd.allreduce(kind(x), name="x", compression=compressor), np.mean(gather(x), axis=0))
    assert_equal(hvd.grouped_allreduce([kind(x)], name="x", compression=compressor)[0], np.mean(gather(x), axis=0))


@pytest.mark.parametrize("mode", MODES)
def test_what_has_no_name(mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor(exchange="allgather")
    x, y = normal(SHAPE), normal(SHAPE, 1)
    both = mode(lambda x, y: (hvd.allreduce(x, compression=compressor), hvd.allreduce(y, compression=compressor)))
    for _ in range(2):
        for result, mine in zip(both(tf.constant(x), tf.constant(y)), (x, y), strict=True):
            assert_within_a_level(QSGD(), result, gather(mine))
            assert_same_on_all_ranks([result])
    pair = hvd.grouped_allreduce([tf.constant(x), tf.constant(x.T)], compression=compressor)
    for result, mine in zip(pair, (x, x.T), strict=True):
        assert_within_a_level(QSGD(), result, gather(mine))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "x",
    [
        dyadic((5000,)),
        dyadic((31, 33)),
        np.float32(hvd.rank()),
        dyadic((5000,)).astype(np.float64),
        dyadic((30, 30)).astype(np.float16),
        np.arange(6000).reshape(60, 100) + hvd.rank(),
        (np.arange(6000).reshape(60, 100) * hvd.rank()).astype(np.int32),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_what_is_small_or_flat_or_whole_goes_through_horovod(x: Any, mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor()
    result = mode(lambda x: hvd.allreduce(x, name="x", compression=compressor))(tf.constant(x))
    expected = hvd.allreduce(tf.constant(x), name="x")
    assert result.dtype == expected.dtype
    assert_equal(result, expected)
    assert set(compressor.stats().bypassed) == {"x"}


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_that_is_not_compressed(mode: Callable[..., Any]) -> None:
    x = tf.cast(dyadic((100,)), tf.bfloat16)
    result = mode(lambda x: hvd.allreduce(x, name="x", compression=QSGDCompressor))(x)
    assert result.dtype == tf.bfloat16
    assert_equal(result, tf.cast(hvd.allreduce(tf.cast(x, tf.float32), name="x"), tf.bfloat16))


def test_a_shape_that_is_not_known_when_traced() -> None:
    compressor = QSGDCompressor()
    signature = [tf.TensorSpec([None, 73], tf.float32)]
    reduce = tf.function(lambda x: hvd.allreduce(x, name="x", compression=compressor), input_signature=signature)
    x = dyadic(SHAPE)
    assert_equal(reduce(tf.constant(x)), np.mean(gather(x), axis=0))
    assert "not known" in compressor.stats().bypassed["x"]


def test_thresholds_can_be_moved() -> None:
    compressor = QSGDCompressor(min_elements=1, min_dims=0, exchange="allgather")
    for step, x in enumerate([normal((700,)), normal((3,)), np.float32(1.5 + hvd.rank())]):
        check_allreduces(compressor, "allgather", x, "x", range(step, step + 1), MODES[step % 2])
    assert not compressor.stats().bypassed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_dtypes(dtype: tf.DType, mode: Callable[..., Any]) -> None:
    for exchange in REFERENCES:
        check_allreduces(
            QSGDCompressor(exchange=exchange), exchange, tf.cast(normal(SHAPE), dtype), "x", range(1), mode
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exchange", REFERENCES)
def test_what_is_not_finite_spoils_its_bucket_on_all_ranks(exchange: str, value: float) -> None:
    x = normal(SHAPE)
    if hvd.rank() == 1:
        x.reshape(-1)[600] = value
    result = hvd.allreduce(tf.constant(x), name="x", compression=QSGDCompressor(exchange=exchange))
    assert_same_on_all_ranks([result])
    spoiled = np.zeros(x.size, bool)
    spoiled[512:1024] = True
    assert_equal(np.isnan(result).reshape(-1), spoiled)
    assert_equal(result, REFERENCES[exchange](QSGD(), gather(x), "x", 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exchange", REFERENCES)
def test_subnormal_numbers(exchange: str, mode: Callable[..., Any]) -> None:
    """TensorFlow takes them for zero in its threads."""
    x = normal(SHAPE) * np.float32(1e-40)
    assert np.any(reference_allgather(QSGD(), gather(x), "x", 0))
    check_allreduces(QSGDCompressor(exchange=exchange), exchange, x, "x", range(1), mode)


def test_sparse_selection_that_is_not_finite_spoils_its_tensor() -> None:
    x = normal(SHAPE)
    if hvd.rank() == 0:
        x[5, 5] = np.inf
    tensors = [tf.constant(x), tf.constant(normal(SHAPE))]
    results = hvd.grouped_allreduce(tensors, name="x", compression=TopKCompressor(error_feedback=False))
    assert np.isnan(results[0]).all()
    assert_equal(results[1], reference_allgather(TopK(), gather(normal(SHAPE)), "x.1", 0))


def test_a_result_keeps_its_value() -> None:
    compressor = QSGDCompressor()
    reduce = tf.function(lambda x: hvd.allreduce(x, name="x", compression=compressor))
    results = [reduce(tf.constant(normal(SHAPE, step))) for step in range(4)]
    copies = [result.numpy().copy() for result in results[:1]]
    for step in range(4, 8):
        reduce(tf.constant(normal(SHAPE, step)))
    assert_equal(results[0], copies[0])
    assert len({result.numpy().tobytes() for result in results}) == len(results)


@pytest.mark.parametrize("mode", MODES)
def test_auto_measures_and_decides_the_same_on_all_ranks(mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor(exchange="auto")
    x = normal((300, 400))
    result = mode(lambda x: hvd.allreduce(x, name="x", compression=compressor))(tf.constant(x))
    assert_within_a_level(QSGD(), result, gather(x), roundings=2)
    assert_same_on_all_ranks([result])
    (decision,) = compressor.stats().decisions.values()
    assert_same_on_all_ranks([np.frombuffer(decision.encode()[:40], np.uint8)])
