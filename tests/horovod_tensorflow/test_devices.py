"""Gradients that are encoded by TensorFlow's operations, on whatever device they are: here the CPU plays a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import REFERENCES, SHAPE, assert_equal
from rank_checks import (
    MODES,
    assert_means,
    assert_same_on_all_ranks,
    by_ranks,
    check_allreduces,
    dyadic,
    gradients_of,
    normal,
)

from hvd_qsgd import QSGD, Cast, Identity, Sign, TopK
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import ErrorFeedback, LoCo
from hvd_qsgd.tensorflow import CastCompressor, Compressor, IdentityCompressor, QSGDCompressor, TopKCompressor

DEVICE = {"kernels": "tensorflow"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exchange", REFERENCES)
@pytest.mark.parametrize(("bits", "norm"), [(4, "max"), (3, "l2")])
def test_quantization(bits: int, norm: str, exchange: str, mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor(bits, norm=norm, exchange=exchange, error_feedback=False, **DEVICE)
    check_allreduces(compressor, exchange, normal(SHAPE, bits), "x", range(2), mode)
    assert compressor.stats().tensors["x"].exchanges == 2


@pytest.mark.parametrize(
    ("make", "exchange"),
    [
        (lambda: TopKCompressor(k=7, values="float16", error_feedback=False, **DEVICE), "allgather"),
        (lambda: IdentityCompressor(**DEVICE), by_ranks(Identity())),
        (lambda: CastCompressor("bfloat16", **DEVICE), by_ranks(Cast())),
        (lambda: QSGDCompressor(fusion_elements=1000, exchange="allgather", **DEVICE), "allgather"),
    ],
    ids=range(4),
)
def test_codecs_and_settings(make: Callable[[], Compressor], exchange: str) -> None:
    check_allreduces(make(), exchange, tf.cast(normal(SHAPE), tf.bfloat16), "x", range(1), MODES[1])


@pytest.mark.parametrize("exchange", REFERENCES)
def test_ranks_with_different_devices_read_each_other(exchange: str) -> None:
    """The bytes on the wire are the same, whatever makes them."""
    compressor = QSGDCompressor(exchange=exchange, kernels="numba" if hvd.rank() % 2 else "tensorflow")
    check_allreduces(compressor, exchange, normal(SHAPE), "x", range(2), MODES[1])


def test_gradients_in_several_exchanges() -> None:
    names, shapes = ["a", "b", "c"], [(40, 50), (50,), (3, 3, 8, 16)]
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in zip(names, shapes)]
    compressor = QSGDCompressor(exchange="allgather", fusion_elements=1000, **DEVICE)
    reduced = tf.function(gradients_of(variables, compressor, op=hvd.Sum))
    for step in range(2):
        raw = [dyadic(shape, 10 * step + i) for i, shape in enumerate(shapes)]
        assert_means(QSGD(), reduced(*map(tf.constant, raw)), raw, names, step, factor=hvd.size())


@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: TopKCompressor(0.1, **settings),
        lambda **settings: TopKCompressor(0.1, error_feedback=LoCo(), **settings),
        lambda **settings: TopKCompressor(0.1, error_feedback=ErrorFeedback("int8"), **settings),
        lambda **settings: QSGDCompressor(error_feedback=True, exchange="scatter_gather", **settings),
        lambda **settings: QSGDCompressor(rounding="nearest", exchange="allreduce", **settings),
    ],
    ids=range(5),
)
def test_feedback_goes_on_from_device_to_device(make: Callable[..., Compressor], tmp_path: Path) -> None:
    """Training on a device, and going on elsewhere from its checkpoint, equals training on the CPU."""

    def train(compressor: Compressor, steps: range) -> list[np.ndarray]:
        reduced = tf.function(gradients_of([tf.Variable(tf.zeros(SHAPE), name="w")], compressor))
        return [reduced(tf.constant(normal(SHAPE, step)))[0].numpy() for step in steps]

    expected = train(make(), range(5))
    compressor = make(**DEVICE)
    results = train(compressor, range(3))
    path = tf.train.Checkpoint(compression=compressor).save(str(tmp_path / f"rank{hvd.rank()}"))
    for settings in ({}, DEVICE):
        resumed = make(**settings)
        tf.train.Checkpoint(compression=resumed).restore(path).assert_consumed()
        for result, other in zip([*results, *train(resumed, range(3, 5))], expected, strict=True):
            assert_equal(result, other)


def test_a_step_that_is_not_finite() -> None:
    compressor = TopKCompressor(0.1, **DEVICE)
    reduced = tf.function(gradients_of([tf.Variable(tf.zeros(SHAPE), name="w")], compressor))
    reduced(tf.constant(normal(SHAPE)))
    before = compressor.state_dict()["arrays"]["residual/w"]
    spoiled = normal(SHAPE, 1)
    spoiled[5, 5] = np.nan if hvd.rank() else 0
    assert np.isnan(reduced(tf.constant(spoiled))[0]).all()
    assert_equal(compressor.state_dict()["arrays"]["residual/w"], before)


def kinds_of_calls(compressor: Compressor) -> dict[str, int]:
    """How often each operation that calls Python is in the graph of an allreduce."""
    reduce = tf.function(lambda x: hvd.allreduce(x, name="x", compression=compressor))
    graph = reduce.get_concrete_function(tf.constant(normal(SHAPE))).graph
    kinds = [operation.type for operation in graph.get_operations()]
    return {kind: kinds.count(kind) for kind in ("EagerPyFunc", "PyFunc", "PyFuncStateless")}


def test_what_is_on_a_gpu_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_qsgd.tensorflow import compressor as module

    on_host = {"EagerPyFunc": 0, "PyFunc": 4, "PyFuncStateless": 1}
    on_device = {"EagerPyFunc": 3, "PyFunc": 2, "PyFuncStateless": 0}
    assert kinds_of_calls(QSGDCompressor(exchange="allgather")) == on_host
    monkeypatch.setattr(module, "is_accelerator", lambda device: True)
    assert kinds_of_calls(QSGDCompressor(exchange="allgather")) == on_device
    assert kinds_of_calls(QSGDCompressor(exchange="allgather", kernels="numba")) == on_host
    compressor = Compressor(Sign(), exchange="allgather")
    with pytest.warns(UserWarning, match="Gradients are copied from .* to the CPU: The codec 'sign' has no tensorflow"):
        assert kinds_of_calls(compressor) == on_host
    compressor = QSGDCompressor(exchange="auto")
    result = hvd.allreduce(tf.constant(normal(SHAPE)), name="x", compression=compressor)
    assert_same_on_all_ranks([result])
    assert len(compressor.stats().decisions) == 1


def test_devices() -> None:
    from hvd_qsgd.tensorflow.backends import device_of, is_accelerator

    x = tf.constant(1.0)
    assert device_of(x).endswith("CPU:0") and not is_accelerator(device_of(x))
    assert is_accelerator("/job:localhost/replica:0/task:0/device:GPU:1")
    # On a machine without a GPU.
    assert not is_accelerator("")

    variable = tf.Variable(0.0)

    @tf.function
    def traced(x: tf.Tensor) -> tf.Tensor:
        assert device_of(x) == ""
        assert device_of(x, variable) == variable.device
        with tf.device("/gpu:0"):
            assert is_accelerator(device_of(x + 1, variable))
        return x

    traced(x)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no tensorflow kernels"):
        Compressor(Sign(), kernels="tensorflow")
    with pytest.raises(ConfigError, match="kernels='triton' is not one of"):
        QSGDCompressor(kernels="triton")
    assert repr(QSGDCompressor(kernels="tensorflow")) == repr(QSGDCompressor())
    assert TopK() == TopKCompressor(kernels="tensorflow").codec
