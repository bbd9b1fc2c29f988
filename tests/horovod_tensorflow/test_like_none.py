"""What works with hvd.Compression.none works with a compressor, to the same bits if it loses none. And what is
refused there on all ranks is refused here on all ranks.

Sums of two ranks are the same in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from rank_checks import MODES, eager, gradients_of, traced

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.tensorflow import IdentityCompressor, QSGDCompressor
from hvd_qsgd.tensorflow.backends import HOST
from hvd_qsgd.tensorflow.plan import Bundle
from hvd_qsgd.tuning.cost import Decision

pytestmark = pytest.mark.ranks(2)

#: What is raised while a graph runs has a type of TensorFlow's.
FAILED = (ExchangeError, tf.errors.OpError)
SHAPES = [(), (1,), (17,), (17, 17), (17, 17, 17), (0, 5)]
RANK = hvd.rank()


def lossless(**settings: Any) -> IdentityCompressor:
    return IdentityCompressor(min_elements=1, min_dims=0, **settings)


def random(shape: Sequence[int], dtype: tf.DType, seed: int = 0) -> tf.Tensor:
    values = np.random.default_rng([seed, RANK]).uniform(-100, 100, shape)
    return tf.cast(tf.constant(values), dtype)


def assert_same_bits(results: Sequence[Any], expected: Sequence[Any]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype and result.shape == other.shape
        assert result.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_allreduce_of_all_types_and_dimensions(op: Any, mode: Callable[..., Any]) -> None:
    for dtype in (tf.int32, tf.int64, tf.float16, tf.float32):
        tensors = [random(shape, dtype, i) for i, shape in enumerate(SHAPES)]

        def reduced(*tensors: tf.Tensor, compression: Any) -> list[tf.Tensor]:
            return [
                hvd.allreduce(x, name=f"x{i}", op=op, compression=compression, prescale_factor=1.0)
                for i, x in enumerate(tensors)
            ]

        results = [
            mode(lambda *tensors, c=c: reduced(*tensors, compression=c))(*tensors)
            for c in (lossless(), hvd.Compression.none)
        ]
        if dtype == tf.float16:
            # Horovod divides, and adds up, in half precision.
            for result, other in zip(*results):
                np.testing.assert_allclose(result, other, rtol=2e-3, atol=0.1)
        else:
            assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
def test_many_at_a_time(mode: Callable[..., Any]) -> None:
    """Horovod fuses them."""
    tensors = [random((17, i + 1), tf.float32, i) for i in range(40)]
    results = [
        mode(lambda *x, c=c: [hvd.allreduce(t, name=f"x{i}", compression=c) for i, t in enumerate(x)])(*tensors)
        for c in (lossless(), hvd.Compression.none)
    ]
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 4.0}], ids=str)
def test_groups_without_names(settings: dict[str, Any], mode: Callable[..., Any]) -> None:
    tensors = [random(shape, tf.float32, i) for i, shape in enumerate([(5, 5), (1000,), (3,), ()])]
    results = [
        mode(lambda *x, c=c: hvd.grouped_allreduce(list(x), compression=c, **settings))(*tensors)
        for c in (lossless(), hvd.Compression.none)
    ]
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"op": hvd.Sum}, {"groups": 2}, {"gradient_predivide_factor": 2.0}], ids=str)
def test_gradients(settings: dict[str, Any], mode: Callable[..., Any]) -> None:
    variables = [tf.Variable(tf.zeros(shape), name="w") for shape in [(40, 50), (50,), (), (3, 3, 4)]]
    raw = [random(v.shape, tf.float32, i) for i, v in enumerate(variables)]
    results = [mode(gradients_of(variables, c, **settings))(*raw) for c in (lossless(), hvd.Compression.none)]
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
def test_scopes_and_generic_names(mode: Callable[..., Any]) -> None:
    """Names that Horovod makes of those of operations, and that are taken twice."""

    def reduced(x: tf.Tensor, compression: Any) -> list[tf.Tensor]:
        results = []
        for scope in ("first", "first", "second"):
            with tf.name_scope(scope):
                results.append(hvd.allreduce(x, name="x", compression=compression))
                results.append(hvd.allreduce(2 * x, name="x", compression=compression))
                results.append(hvd.allreduce(3 * x, compression=compression))
        with tf.control_dependencies(results), tf.name_scope("third"):
            results.append(hvd.allreduce(4 * x, name="x", compression=compression, ignore_name_scope=True))
        return results

    functions = [mode(lambda x, c=c: reduced(x, c)) for c in (lossless(), hvd.Compression.none)]
    # In a graph exchanges of one name are under way at the same time.
    for seed in range(40):
        x = random((40, 50), tf.float32, seed)
        assert_same_bits(*(function(x) for function in functions))
    variables = [tf.Variable(tf.zeros((40, 50)), name="w"), tf.Variable(tf.zeros(3), name="b")]

    def generic(x: tf.Tensor, y: tf.Tensor, compression: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variables[0] * x) + tf.reduce_sum(variables[1] * y)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, variables, use_generic_names=True)

    y = random((3,), tf.float32)
    results = (mode(lambda x, y, c=c: generic(x, y, c))(x, y) for c in (lossless(), hvd.Compression.none))
    assert_same_bits(*results)


def test_buffers_belong_to_one_run_at_a_time() -> None:
    bundle = Bundle([], [], "name", HOST)
    first, second = bundle.take_buffers(), bundle.take_buffers()
    bundle.give_back(first)
    third, fourth = bundle.take_buffers(), bundle.take_buffers()
    assert third is first and len({id(buffers) for buffers in (second, third, fourth)}) == 3


#: What is run, of a number: what follows from constants alone TensorFlow would compute when it optimizes a graph.
Case = Callable[[tf.Tensor], Any]


def filled(shape: Sequence[int], value: tf.Tensor, dtype: tf.DType = tf.float32) -> tf.Tensor:
    return tf.cast(tf.fill(shape, value), dtype)


def one(
    shape: Sequence[int], compression: Any, dtype: tf.DType = tf.float32, name: str | None = "x", **settings: Any
) -> Case:
    return lambda value: hvd.allreduce(filled(shape, value, dtype), name=name, compression=compression, **settings)


def group(shapes: Sequence[Sequence[int]], compression: Any, dtype: tf.DType = tf.float32) -> Case:
    return lambda value: hvd.grouped_allreduce(
        [filled(shape, value, dtype) for shape in shapes], name="x", compression=compression
    )


def tape(shapes: Sequence[Sequence[int]], compression: Any, dtype: tf.DType = tf.float32, **settings: Any) -> Case:
    variables = [tf.Variable(tf.zeros(shape, dtype), name="w") for shape in shapes]
    reduced = gradients_of(variables, compression, **settings)
    return lambda value: reduced(*(filled(shape, value, dtype) for shape in shapes))


def optimizer(shapes: Sequence[Sequence[int]], compression: Any) -> Case:
    variables = [tf.Variable(tf.zeros(shape), name="w") for shape in shapes]
    inner = tf.compat.v1.train.GradientDescentOptimizer(0.1)
    distributed = hvd.DistributedOptimizer(inner, compression=compression)
    return lambda value: distributed.compute_gradients(
        lambda: tf.add_n([value * tf.reduce_sum(v) for v in variables]), variables
    )


FLOAT_OR_INT = tf.float32 if RANK else tf.int32
FLOAT_OR_HALF = tf.float32 if RANK else tf.float16
SMALL = (8, 8)
#: Some tensors are too small for one of the ranks.
MISMATCHED: dict[str, Callable[[Any], Case]] = {
    "shape": lambda c: one((64, 64 + RANK), c),
    "transposed": lambda c: one((64, 96) if RANK else (96, 64), c),
    "shape without a name": lambda c: one((64, 64 + RANK), c, name=None),
    "small on one rank": lambda c: one((64, 64) if RANK else SMALL, c),
    "small on one rank, without a name": lambda c: one((64, 64) if RANK else SMALL, c, name=None),
    "integers on one rank": lambda c: one((64, 64), c, FLOAT_OR_INT),
    "halves on one rank": lambda c: one((64, 64), c, FLOAT_OR_HALF),
    "not compressed on one rank": lambda c: one((64, 64), c if RANK else hvd.Compression.fp16),
    "operation": lambda c: one((64, 64), c, op=hvd.Sum if RANK else hvd.Average),
    "factor": lambda c: one((64, 64), c, prescale_factor=1.0 + RANK),
    "tape: operation": lambda c: tape([(64, 64)], c, op=hvd.Sum if RANK else hvd.Average),
    "group: shape": lambda c: group([(64, 64), (64, 64 + RANK)], c),
    "group: type": lambda c: group([(64, 64)] * 2, c, FLOAT_OR_HALF),
    "group: small on one rank": lambda c: group([(8, 8 if RANK else 800)] * 2, c),
    "tape: shape": lambda c: tape([(64, 64 + RANK)], c),
    "tape: transposed": lambda c: tape([(64, 96) if RANK else (96, 64)], c),
    "tape: type": lambda c: tape([(64, 64)], c, FLOAT_OR_HALF),
    "tape: small on one rank": lambda c: tape([(8, 8 if RANK else 800)], c),
    "tape: group": lambda c: tape([(64, 64 + RANK)], c, groups=1),
    "optimizer": lambda c: optimizer([(64, 64 + RANK)], c),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", MISMATCHED)
@pytest.mark.parametrize(
    "compression", [hvd.Compression.none, QSGDCompressor(exchange="allgather")], ids=["none", "qsgd"]
)
def test_what_is_refused_on_all_ranks(compression: Any, case: str, mode: Callable[..., Any]) -> None:
    """By Horovod, and so by a compressor."""
    if case == "optimizer" and mode is eager:
        mode = traced
    with pytest.raises(FAILED):
        mode(MISMATCHED[case](compression))(tf.constant(1.0))
    # And the next one works.
    hvd.allreduce(tf.ones((64, 64)), name="x", compression=compression)


MORE: dict[str, Callable[[Any], Case]] = {
    "another variable": lambda c: tape([(64, 64), (64 + RANK, 64), (30, 50)], c),
    "one more": lambda c: tape([(64, 64)] * (1 + RANK), c),
    "one more is small": lambda c: tape([(64, 64), *[(5,)] * RANK], c),
    "another place": lambda c: tape([(64, 64), (5,)] if RANK else [(5,), (64, 64)], c),
    "one more of a group": lambda c: group([(64, 64)] * (1 + RANK), c),
    "optimizer": lambda c: optimizer([(64, 64)] * (1 + RANK), c),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("exchange", ["allgather", "auto"])
def test_models_that_differ(exchange: str, case: str, mode: Callable[..., Any]) -> None:
    """Stock Horovod waits for ever where a rank has more tensors than others."""
    if case == "optimizer" and mode is eager:
        mode = traced
    compressor = QSGDCompressor(exchange=exchange)
    for _ in range(2):
        with pytest.raises(FAILED, match="All ranks must run the same model"):
            mode(MORE[case](compressor))(tf.constant(1.0))


def test_an_error_names_what_differs() -> None:
    variables = [tf.Variable(tf.zeros((64, 64)), name="first"), tf.Variable(tf.zeros((64 + RANK, 64)), name="second")]
    other = "second float32 (64, 64)" if RANK else "second float32 (65, 64)"
    with pytest.raises(FAILED) as raised:
        gradients_of(variables, QSGDCompressor())(tf.ones((64, 64)), tf.ones((64 + RANK, 64)))
    assert f"rank {1 - RANK} has tensors=['{other}'] where this one has ['second" in str(raised.value)
    with pytest.raises(ExchangeError, match=r"rank \d has compressor=.*QSGD\(bits=\d"):
        hvd.allreduce(tf.ones((64, 64)), name="x", compression=QSGDCompressor(4 + RANK))


def test_auto_on_one_rank() -> None:
    """It would measure while a graph is traced, and others would not."""
    compressor = QSGDCompressor(exchange="auto" if RANK else "allgather")
    for mode in MODES:
        for case in (one((64, 64), compressor), tape([(64, 64), (5,)], compressor), group([(64, 64)] * 2, compressor)):
            with pytest.raises(FAILED, match="All ranks must run the same model"):
                mode(case)(tf.constant(1.0))


@pytest.mark.parametrize("exchange", ["allgather", "auto"])
@pytest.mark.parametrize("min_dims", [0, 2])
def test_one_rank_traces_anew(min_dims: int, exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a last batch that is smaller on one rank: the others neither trace nor optimize a graph at that time.

    The gradient of the bias is a constant; stock Horovod waits for ever for those.
    """
    monkeypatch.setattr("hvd_qsgd.tuning.auto.decide", lambda *_: Decision("allgather", {}))
    variable, bias = tf.Variable(tf.zeros((40, 50)), name="kernel"), tf.Variable(tf.zeros(50), name="bias")
    compressor = IdentityCompressor(min_elements=1, min_dims=min_dims, exchange=exchange)

    def means(x: tf.Tensor, biased: bool = True) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x @ variable + bias)
        variables = [variable, bias] if biased else [variable]
        return hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, variables)

    def several(x: tf.Tensor) -> list[tf.Tensor]:
        total = tf.zeros((40, 50))
        for turn in tf.range(4):
            # Turns may be under way at the same time, which is too much for what Horovod reduces itself.
            total += means(x * tf.cast(turn, tf.float32), min_dims == 0)[0]
        return [total]

    def alone(x: tf.Tensor) -> list[tf.Tensor]:
        return [hvd.allreduce(tf.reduce_sum(x) * tf.ones((40, 50)) / 40, name="x", compression=compressor)]

    for function, factor in ((means, 1), (several, 6), (alone, 1)):
        reduced = tf.function(function)
        for size in (1, 3, 5, 1):
            rows = size if RANK == 0 else 1
            results = reduced(tf.ones((rows, 40)))
            np.testing.assert_array_equal(results[0], np.full((40, 50), factor * (size + 1) / 2, np.float32))


def test_tensorflow_does_not_warn_of_functions_that_are_not_the_users(caplog: pytest.LogCaptureFixture) -> None:
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for size in range(6):
            for kernels in ("numba", "tensorflow"):
                compressor = QSGDCompressor(exchange="auto" if size < 3 else "allgather", kernels=kernels)
                one((64, 64 + size), compressor)(tf.constant(1.0))
                group([(64, 64 + size)] * 2, compressor)(tf.constant(1.0))
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text
