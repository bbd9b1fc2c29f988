"""hvd_qsgd.keras with Keras 3, which stock Horovod does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
from expectations import REFERENCES, assert_equal, reference_allgather
from rank_checks import MODES, assert_same_on_all_ranks, by_ranks, dyadic, gather, normal

from hvd_qsgd import QSGD
from hvd_qsgd.errors import ConfigError, UnsupportedError
from hvd_qsgd.keras import (
    BroadcastGlobalVariablesCallback,
    DistributedOptimizer,
    MetricAverageCallback,
    QSGDCompressor,
    TopKCompressor,
)

LR = 0.125


def make_variable(name: str = "w") -> keras.Variable:
    return keras.Variable(np.zeros((40, 50), np.float32), name=name)


def make_model(units: int = 32, seed: int | None = None) -> keras.Model:
    keras.utils.set_random_seed(hvd.rank() if seed is None else seed)
    return keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(8),
        ]
    )


def make_data(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Different data on each rank, from one linear map."""
    x = normal((count, 64), seed=5)
    return x, x @ normal((64, 8), seed=6, rank=0) / 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("settings", "factor"),
    [({}, 1.0), ({"op": hvd.Sum}, hvd.size()), ({"gradient_predivide_factor": 2.0}, 1.0), ({"groups": 1}, 1.0)],
    ids=str,
)
def test_what_is_applied(settings: dict[str, Any], factor: float, mode: Any) -> None:
    variables = [make_variable(), keras.Variable(np.zeros(50, np.float32), name="b"), make_variable()]
    optimizer = DistributedOptimizer(
        keras.optimizers.SGD(LR), compression=QSGDCompressor(exchange="allgather"), **settings
    )
    apply = mode(lambda *grads: optimizer.apply_gradients(zip(grads, variables)))
    expected = [np.zeros(v.shape, np.float32) for v in variables]
    for step in range(2):
        raw = [dyadic(v.shape, 10 * step + i) for i, v in enumerate(variables)]
        apply(*map(tf.constant, raw))
        for i, name in enumerate(["w", "b", "w (2)"]):
            inputs = gather(raw[i])
            mean = np.mean(inputs, axis=0) if name == "b" else reference_allgather(QSGD(), inputs, name, step)
            expected[i] = expected[i] - np.float32(LR) * (mean * np.float32(factor))
            assert_equal(variables[i].value, expected[i])
    assert_same_on_all_ranks([v.value for v in variables])


@pytest.mark.parametrize("average", [False, True])
def test_backward_passes_per_step(average: bool) -> None:
    variable = make_variable()
    optimizer = DistributedOptimizer(
        keras.optimizers.SGD(LR),
        compression=QSGDCompressor(),
        backward_passes_per_step=4,
        average_aggregated_gradients=average,
    )
    apply = tf.function(lambda grad: optimizer.apply_gradients([(grad, variable)]))
    expected = np.zeros((40, 50), np.float32)
    for step in range(2):
        raw = [dyadic((40, 50), 10 * step + i) for i in range(4)]
        for grad in raw:
            assert_equal(variable.value, expected)
            apply(tf.constant(grad))
        total = np.sum(raw, axis=0) / np.float32(4 if average else 1)
        mean = REFERENCES[by_ranks(QSGD())](QSGD(), gather(total), "w", step)
        expected = expected - np.float32(LR) * mean
    assert_equal(variable.value, expected)
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("compression", [hvd.Compression.none, QSGDCompressor, TopKCompressor(0.1)], ids=str)
def test_fit(compression: Any) -> None:
    model = make_model()
    optimizer = DistributedOptimizer(keras.optimizers.Adam(1e-3), compression=compression)
    assert isinstance(optimizer, keras.optimizers.Adam)
    model.compile(optimizer, "mse", metrics=["mae"])
    x, y = make_data()
    callbacks = [BroadcastGlobalVariablesCallback(0), MetricAverageCallback()]
    history = model.fit(x, y, batch_size=32, epochs=6, verbose=0, callbacks=callbacks).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert_same_on_all_ranks([w.value for w in model.weights])
    assert_same_on_all_ranks([np.array(history["loss"]), np.array(history["mae"])])
    assert_same_on_all_ranks([v.value for v in optimizer.variables])
    if compression is not hvd.Compression.none:
        compressed = [s for s in compression.stats().tensors.values() if s.exchange]
        assert [s.exchanges for s in compressed] == [48]
        compression.reset()


def test_fit_with_several_steps_in_one_graph() -> None:
    model = make_model(seed=0)
    compressor = TopKCompressor(0.1)
    model.compile(
        DistributedOptimizer(keras.optimizers.SGD(0.01), compression=compressor), "mse", steps_per_execution=4
    )
    x, y = make_data()
    history = model.fit(x, y, batch_size=32, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert_same_on_all_ranks([w.value for w in model.trainable_weights])
    assert sum(s.exchanges for s in compressor.stats().tensors.values() if s.exchange) == 24


def test_run_eagerly() -> None:
    model = make_model(seed=0)
    model.compile(
        DistributedOptimizer(keras.optimizers.SGD(0.01), compression=QSGDCompressor()), "mse", run_eagerly=True
    )
    x, y = make_data(64)
    model.fit(x, y, batch_size=32, verbose=0)
    assert_same_on_all_ranks([w.value for w in model.trainable_weights])


def test_all_ranks_skip_a_step_that_overflows_on_one() -> None:
    variable = make_variable()
    compressor = TopKCompressor(0.1)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(LR), initial_scale=8.0)
    optimizer = DistributedOptimizer(scaled, compression=compressor)
    apply = tf.function(lambda grad: optimizer.apply_gradients([(grad, variable)]))
    apply(tf.constant(8 * normal((40, 50))))
    before, residual = variable.numpy(), compressor.state_dict()["arrays"]["residual/w"]
    overflow = normal((40, 50))
    if hvd.rank() == 1:
        overflow[3, 3] = np.inf
    apply(tf.constant(overflow))
    assert_equal(variable.value, before)
    assert_equal(compressor.state_dict()["arrays"]["residual/w"], residual)
    assert float(optimizer.dynamic_scale) == 4.0
    apply(tf.constant(4 * normal((40, 50), 1)))
    assert not np.array_equal(variable.numpy(), before)
    assert_same_on_all_ranks([variable.value])


def test_mixed_bfloat16() -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = make_model(seed=0)
        compressor = TopKCompressor(0.1)
        model.compile(DistributedOptimizer(keras.optimizers.SGD(0.01), compression=compressor), "mse")
        x, y = make_data()
        history = model.fit(x, y, batch_size=32, epochs=4, verbose=0).history
        assert model.layers[0].compute_dtype == "bfloat16"
        assert history["loss"][-1] < history["loss"][0]
        assert any(name.endswith("kernel") and not s.bypassed for name, s in compressor.stats().tensors.items())
        assert_same_on_all_ranks([w.value for w in model.trainable_weights])
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_mixed_precision() -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = make_model(seed=0)
        optimizer = DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**24),
            compression=QSGDCompressor(),
        )
        model.compile(optimizer, "mse")
        x, y = make_data()
        history = model.fit(x, y, batch_size=32, epochs=4, verbose=0).history
        assert float(optimizer.dynamic_scale) < 2.0**24, "no step overflowed"
        assert history["loss"][-1] < history["loss"][0]
        assert_same_on_all_ranks([w.value for w in model.trainable_weights])
        inside_out = DistributedOptimizer(keras.optimizers.SGD(0.01), compression=QSGDCompressor())
        model.compile(inside_out, "mse")
        with pytest.raises(UnsupportedError, match="other way round"):
            model.fit(x, y, batch_size=32, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_xla_is_refused() -> None:
    model = make_model(seed=0)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.01), compression=QSGDCompressor())
    model.compile(optimizer, "mse", jit_compile=True)
    x, y = make_data(64)
    with pytest.raises(UnsupportedError, match="jit_compile=False"):
        model.fit(x, y, batch_size=32, verbose=0)


def test_a_saved_model_needs_no_horovod(tmp_path: Path) -> None:
    model = make_model(seed=0)
    model.compile(DistributedOptimizer(keras.optimizers.Adam(), compression=QSGDCompressor()), "mse")
    x, y = make_data(64)
    model.fit(x, y, batch_size=32, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    for mine, other in zip(model.weights, loaded.weights, strict=True):
        assert_equal(mine.value, other.value)
    assert int(loaded.optimizer.iterations) == 2


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Average"):
        DistributedOptimizer(keras.optimizers.SGD(), op=hvd.Adasum)
    with pytest.raises(ConfigError, match="backward_passes_per_step=4"):
        DistributedOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=4))
    with pytest.raises(ConfigError, match="1 or more"):
        DistributedOptimizer(keras.optimizers.SGD(), backward_passes_per_step=0)
