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
from hvd_qsgd.errors import ConfigError, ExchangeError, UnsupportedError
from hvd_qsgd.keras import (
    BroadcastGlobalVariablesCallback,
    DistributedOptimizer,
    IdentityCompressor,
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


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """As in many tutorials: without a configuration."""

    def __init__(self, top: float) -> None:
        super().__init__()
        self.top = top

    def __call__(self, step: Any) -> Any:
        return self.top / (1.0 + tf.cast(step, tf.float32))


class Own(keras.optimizers.SGD):
    """Has other arguments than its base, and no configuration of its own."""

    def __init__(self, tables: list[float], *, momentum: float) -> None:
        super().__init__(tables[0], momentum=momentum)
        self.tables = tables


@keras.saving.register_keras_serializable(package="tests")
class Registered(keras.optimizers.SGD):
    pass


def rate_changed() -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.learning_rate = 0.25
    return optimizer


def bias_excluded() -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def of_several() -> keras.optimizers.Optimizer:
    inner = {".*bias": keras.optimizers.Adam(0.1)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, 0.9), inner))


#: Every class of Keras, and settings that make a difference.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
} | {
    "schedule": lambda: keras.optimizers.SGD(Schedule(0.5), momentum=0.9),
    "function": lambda: keras.optimizers.SGD(lambda: 0.125),
    "own class": lambda: Own([0.25, 0.5], momentum=0.9),
    "rate changed": rate_changed,
    "bias excluded": bias_excluded,
    "average": lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_overwrite_frequency=2),
    "norm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.5),
    "global norm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5),
    "value": lambda: keras.optimizers.SGD(0.1, clipvalue=0.25),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), 8.0, dynamic_growth_steps=2),
    "several": of_several,
}


def test_every_optimizer_goes_on_as_it_was() -> None:
    """Made distributed before its first step or in between, it does what it does alone with the mean gradients."""
    assert len(OPTIMIZERS) > 20
    shapes = {"kernel": (6, 5), "bias": (5,)}
    own = [[dyadic(shape, 10 * step + i) for i, shape in enumerate(shapes.values())] for step in range(4)]
    mean = [[np.mean(gather(grad), axis=0, dtype=np.float32) for grad in grads] for grads in own]
    for name, make in OPTIMIZERS.items():
        runs = []
        for distributed_at in (None, 0, 2):
            optimizer = make()
            variables = [keras.Variable(dyadic(shape, 7, rank=0), name=name) for name, shape in shapes.items()]
            grads = mean
            for step in range(4):
                if step == distributed_at:
                    assert DistributedOptimizer(optimizer, compression=IdentityCompressor(min_elements=1)) is optimizer
                    grads = own
                optimizer.apply_gradients(zip(map(tf.constant, grads[step]), variables))
            runs.append([v.numpy() for v in (*variables, *optimizer.variables)])
        for alone, new, under_way in zip(*runs, strict=True):
            np.testing.assert_array_equal(new, alone, err_msg=name)
            np.testing.assert_array_equal(under_way, alone, err_msg=name)


def train(model: keras.Model, epochs: int, optimizer: Any, *callbacks: Any, **settings: Any) -> keras.Model:
    x, y = make_data()
    model.compile(DistributedOptimizer(optimizer, **settings), "mse", jit_compile=False)
    model.fit(x, y, batch_size=64, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model


def test_a_loaded_model_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    def make() -> tuple[keras.Model, keras.optimizers.Optimizer]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(8)])
        return model, keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05), dynamic_growth_steps=3)

    (whole, optimizer), (first, other) = make(), make()
    train(whole, 4, optimizer)
    train(first, 2, other).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    train(loaded, 2, loaded.optimizer)
    # Only one rank has the file; the others start anew, with layers of other names.
    resumed, optimizer = make()
    if hvd.rank() == 0:
        resumed = keras.saving.load_model(tmp_path / "model.keras")
        optimizer = resumed.optimizer
    else:
        resumed.weights[0].assign(tf.ones((64, 8)))
    train(resumed, 2, optimizer, BroadcastGlobalVariablesCallback(0))
    for model in (loaded, resumed):
        assert int(model.optimizer.iterations) == 16 and float(model.optimizer.dynamic_scale) > 2.0**15
        found, expected = [[*m.weights, *m.optimizer.variables] for m in (model, whole)]
        for variable, other in zip(found, expected, strict=True):
            assert_equal(variable, other.numpy())


def test_models_that_only_one_rank_can_have() -> None:
    """Ranks whose variables differ are told so, all of them, and none waits."""
    model = make_model(seed=0)
    adam, sgd = keras.optimizers.Adam(), keras.optimizers.SGD()
    with pytest.raises(ExchangeError, match="optimizer=Adam and optimizer=SGD"):
        train(model, 1, adam if hvd.rank() == 0 else sgd, BroadcastGlobalVariablesCallback(0))
    model = make_model(32 if hvd.rank() == 0 else 16)
    with pytest.raises(ExchangeError, match=r"float32\[64, 32\] and float32\[64, 16\]"):
        train(model, 1, keras.optimizers.SGD(), BroadcastGlobalVariablesCallback(0))


def test_a_class_of_ones_own_is_saved_as_it_was_registered(tmp_path: Path) -> None:
    model = make_model(seed=0)
    train(model, 1, Registered(0.01)).save(tmp_path / "model.keras")
    assert type(keras.saving.load_model(tmp_path / "model.keras").optimizer) is Registered


@pytest.mark.parametrize("built", [False, True])
def test_gradients_added_up_are_in_a_checkpoint(built: bool, tmp_path: Path) -> None:
    def start() -> tuple[keras.Variable, keras.optimizers.Optimizer]:
        optimizer = keras.optimizers.SGD(LR)
        if built:
            optimizer.build([variable := make_variable()])
        else:
            variable = make_variable()
        return variable, DistributedOptimizer(optimizer, backward_passes_per_step=2)

    def step(variable: keras.Variable, optimizer: keras.optimizers.Optimizer, number: int) -> None:
        optimizer.apply_gradients([(tf.constant(dyadic((40, 50), number)), variable)])

    whole, first = start(), start()
    for number in range(4):
        step(*whole, number)
    for number in range(3):
        step(*first, number)
    path = tf.train.Checkpoint(w=first[0].value, optimizer=first[1]).write(str(tmp_path / f"{hvd.rank()}"))
    last = start()
    tf.train.Checkpoint(w=last[0].value, optimizer=last[1]).read(path)
    step(*last, 3)
    assert_equal(last[0].value, whole[0].numpy())
    assert int(last[1].iterations) == 2
    assert whole[0].numpy().any()


def test_metrics_are_averaged_element_by_element() -> None:
    rank, ranks = hvd.rank(), hvd.size()
    logs = {
        "loss": 1.0 + rank,
        "f1": np.array([rank, 1, np.nan], np.float32),
        "matrix": tf.constant([[rank, 2 * rank]]),
        "many": [rank, 2],
        "count": np.int64(rank),
        "note": f"rank {rank}",
        "nothing": None,
    }
    # The order is that of the rank.
    logs = dict(sorted(logs.items(), reverse=bool(rank)))
    MetricAverageCallback().on_epoch_end(0, logs)
    mean = (ranks - 1) / 2
    assert logs["loss"] == 1 + mean and type(logs["loss"]) is float and type(logs["count"]) is float
    assert_equal(logs["f1"], np.array([mean, 1, np.nan], np.float32))
    np.testing.assert_array_equal(logs["matrix"], [[mean, 2 * mean]])
    np.testing.assert_array_equal(logs["many"], [mean, 2])
    assert logs["note"] == f"rank {rank}" and logs["nothing"] is None


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        ({"loss": 1.0, "val_loss": 2.0}, r"\['val_loss'\] of rank 0 and rank 1 have the shapes \[\(\)\] and \[None\]"),
        ({"loss": np.ones(3)}, "'loss'"),
        ({"loss": None}, "'loss'"),
        ({}, "'loss'"),
    ],
)
def test_metrics_of_some_ranks_are_refused_by_all(mine: dict[str, Any], told: str) -> None:
    """As where only one rank has validation data."""
    logs = mine if hvd.rank() == 0 else {"loss": 1.0}
    with pytest.raises(ExchangeError, match=told):
        MetricAverageCallback().on_epoch_end(0, logs)


def test_a_metric_with_a_value_for_each_class() -> None:
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(8, activation="softmax")])
    metrics = [keras.metrics.F1Score(average=None, name="f1"), "accuracy"]
    model.compile(DistributedOptimizer(keras.optimizers.SGD()), "categorical_crossentropy", metrics=metrics)
    x, y = make_data()
    labels = np.eye(8, dtype=np.float32)[y.argmax(axis=1)]
    callbacks = [MetricAverageCallback()]
    history = model.fit(x, labels, epochs=1, verbose=0, callbacks=callbacks, validation_data=(x, labels)).history
    assert history["f1"][0].shape == history["val_f1"][0].shape == (8,)
    assert_same_on_all_ranks([np.array(history[name]) for name in sorted(history)])


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Average"):
        DistributedOptimizer(keras.optimizers.SGD(), op=hvd.Adasum)
    with pytest.raises(ConfigError, match="backward_passes_per_step=4"):
        DistributedOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=4))
    with pytest.raises(ConfigError, match="1 or more"):
        DistributedOptimizer(keras.optimizers.SGD(), backward_passes_per_step=0)
    distributed = DistributedOptimizer(keras.optimizers.SGD())
    scaled = keras.optimizers.LossScaleOptimizer(distributed)
    for optimizer in (distributed, scaled, keras.optimizers.LossScaleOptimizer(scaled)):
        with pytest.raises(UnsupportedError, match="exchanged twice"):
            DistributedOptimizer(optimizer)
    inner = keras.optimizers.SGD(gradient_accumulation_steps=4)
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(), {"w": inner}))
    with pytest.raises(ConfigError, match="backward_passes_per_step=4"):
        DistributedOptimizer(several)
    chosen = DistributedOptimizer(keras.optimizers.MultiOptimizer(lambda variable: inner))
    with pytest.raises(ConfigError, match="backward_passes_per_step=4"):
        chosen.apply([tf.zeros((40, 50))], [make_variable()])
    with pytest.raises(UnsupportedError, match="'sgd', which is not an optimizer of Keras 3"):
        DistributedOptimizer("sgd")

    class Alone(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars: Any) -> None:
            for grad, variable in grads_and_vars:
                variable.assign_sub(grad)

    with pytest.raises(UnsupportedError, match="its own way"):
        DistributedOptimizer(Alone()).apply_gradients([(tf.zeros((40, 50)), make_variable())])
