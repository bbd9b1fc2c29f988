"""Horovod's own Keras functions with tf-keras, in jobs with TF_USE_LEGACY_KERAS=1."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from expectations import REFERENCES, assert_equal, reference_allgather
from rank_checks import assert_same_on_all_ranks, by_ranks, dyadic, gather, normal

from hvd_qsgd import QSGD
from hvd_qsgd.tensorflow import QSGDCompressor, TopKCompressor

LR = 0.125


def make_model() -> Any:
    tf_keras.utils.set_random_seed(hvd.rank())
    return tf_keras.Sequential(
        [tf_keras.layers.Input((64,)), tf_keras.layers.Dense(32, activation="relu"), tf_keras.layers.Dense(8)]
    )


def make_data() -> tuple[np.ndarray, np.ndarray]:
    x = normal((256, 64), seed=5)
    return x, x @ normal((64, 8), seed=6, rank=0) / 8


@pytest.mark.parametrize(
    ("wrap", "settings"),
    [
        (hvd.DistributedOptimizer, {}),
        (hvd_keras.DistributedOptimizer, {"gradient_predivide_factor": 2.0}),
        (hvd_keras.DistributedOptimizer, {"sparse_as_dense": True}),
    ],
)
def test_what_is_applied(wrap: Any, settings: dict[str, Any]) -> None:
    variables = [tf.Variable(tf.zeros((40, 50)), name="w"), tf.Variable(tf.zeros(50), name="b")]
    compressor = QSGDCompressor(exchange="allgather")
    optimizer = wrap(tf_keras.optimizers.legacy.SGD(LR), compression=compressor, **settings)

    @tf.function
    def train(*raw: tf.Tensor) -> None:
        optimizer.minimize(lambda: tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables, raw)]), variables)

    expected = [np.zeros(v.shape, np.float32) for v in variables]
    for step in range(2):
        raw = [dyadic(v.shape, 10 * step + i) for i, v in enumerate(variables)]
        train(*map(tf.constant, raw))
        means = [reference_allgather(QSGD(), gather(raw[0]), "w", step), np.mean(gather(raw[1]), axis=0)]
        expected = [value - np.float32(LR) * mean for value, mean in zip(expected, means, strict=True)]
        for variable, value in zip(variables, expected, strict=True):
            assert_equal(variable, value)
    assert_same_on_all_ranks(variables)


@pytest.mark.parametrize(
    ("optimizer", "compression", "settings"),
    [("legacy.Adam", QSGDCompressor, {}), ("Adam", TopKCompressor(0.1), {}), ("Adam", QSGDCompressor, {"groups": 2})],
    ids=str,
)
def test_fit(optimizer: str, compression: Any, settings: dict[str, Any]) -> None:
    make = tf_keras.optimizers.legacy.Adam if optimizer == "legacy.Adam" else tf_keras.optimizers.Adam
    model = make_model()
    model.compile(hvd_keras.DistributedOptimizer(make(1e-3), compression=compression, **settings), "mse")
    x, y = make_data()
    # Horovod's MetricAverageCallback asks the package keras for what only Keras 2 has.
    callbacks = [hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)]
    compression.reset()
    history = model.fit(x, y, batch_size=32, epochs=6, verbose=0, callbacks=callbacks).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert_same_on_all_ranks(model.weights)
    assert [s.exchanges for s in compression.stats().tensors.values() if s.exchange] == [48]


def test_backward_passes_per_step() -> None:
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    optimizer = hvd_keras.DistributedOptimizer(
        tf_keras.optimizers.legacy.SGD(LR), compression=QSGDCompressor(), backward_passes_per_step=3
    )
    expected = np.zeros((40, 50), np.float32)
    for step in range(2):
        raw = [dyadic((40, 50), 10 * step + i) for i in range(3)]
        for grad in raw:
            assert_equal(variable, expected)
            optimizer.minimize(lambda grad=grad: tf.reduce_sum(variable * grad), [variable])
        mean = REFERENCES[by_ranks(QSGD())](QSGD(), gather(np.sum(raw, axis=0)), "w", step)
        expected = expected - np.float32(LR) * mean
    assert_equal(variable, expected)


def test_mixed_precision_with_overflow() -> None:
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = make_model()
        model.set_weights([normal(w.shape, i, rank=0) / 8 for i, w in enumerate(model.weights)])
        optimizer = hvd_keras.DistributedOptimizer(
            tf_keras.optimizers.legacy.SGD(0.01), compression=TopKCompressor(0.1)
        )
        optimizer = tf_keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=2.0**24)
        model.compile(optimizer, "mse")
        x, y = make_data()
        history = model.fit(x, y, batch_size=32, epochs=4, verbose=0).history
        assert float(optimizer.loss_scale) < 2.0**24, "no step overflowed"
        assert history["loss"][-1] < history["loss"][0]
        assert_same_on_all_ranks(model.weights)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def test_optimizers_of_tensorflow_1() -> None:
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    optimizer = hvd.DistributedOptimizer(
        tf.compat.v1.train.GradientDescentOptimizer(LR), compression=QSGDCompressor(exchange="allgather"), op=hvd.Sum
    )
    raw = dyadic((40, 50))

    @tf.function
    def train() -> None:
        grads = optimizer.compute_gradients(lambda: tf.reduce_sum(variable * raw), [variable])
        optimizer.apply_gradients(grads)

    train()
    assert_equal(variable, -np.float32(LR) * hvd.size() * reference_allgather(QSGD(), gather(raw), "w", 0))
