"""hvd.DistributedGradientTape: gradients of many variables in few exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import REFERENCES, assert_equal, reference_allgather
from rank_checks import MODES, assert_means, assert_same_on_all_ranks, dyadic, gather, gradients_of, normal

from hvd_qsgd import QSGD, TopK
from hvd_qsgd.tensorflow import CastCompressor, IdentityCompressor, QSGDCompressor, TopKCompressor

SHAPES = [(40, 50), (50,), (50, 60), (3, 3, 8, 16), (10, 10)]
NAMES = ["kernel", "bias", "kernel (2)", "kernel (3)", "small"]


def make_variables(dtype: Any = tf.float32) -> list[tf.Variable]:
    """Some have the same name, as variables often do."""
    return [tf.Variable(tf.zeros(shape, dtype), name=name.split(" ")[0]) for shape, name in zip(SHAPES, NAMES)]


def make_gradients(seed: int) -> list[np.ndarray]:
    return [dyadic(shape, 10 * seed + i) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exchange", ["allgather", "allreduce"])
@pytest.mark.parametrize("fusion_elements", [1 << 21, 1000])
def test_gradients(exchange: str, fusion_elements: int, mode: Callable[..., Any]) -> None:
    compressor = QSGDCompressor(exchange=exchange, fusion_elements=fusion_elements)
    reduced = mode(gradients_of(make_variables(), compressor))
    for step in range(3):
        raw = make_gradients(step)
        assert_means(QSGD(), reduced(*map(tf.constant, raw)), raw, NAMES, step, REFERENCES[exchange])
    assert set(compressor.stats().bypassed) == {"bias", "small"}
    assert {stats.exchanges for stats in compressor.stats().tensors.values()} == {3}


def test_one_rank_traces_anew() -> None:
    """As with a last batch that is smaller on one rank: the others do not optimize a graph at that time."""
    variable = tf.Variable(tf.zeros((40, 50)), name="kernel")
    compressor = IdentityCompressor()

    @tf.function
    def reduced(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x @ variable)
        return hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, [variable])

    for size in (1, 3, 5):
        rows = size if hvd.rank() == 0 else 1
        (mean,) = reduced(tf.ones((rows, 40)))
        assert_equal(mean, np.full((40, 50), np.float32(size + hvd.size() - 1) / hvd.size()))


@pytest.mark.parametrize("mode", MODES)
def test_many_gradients_travel_together(mode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_qsgd.tensorflow import plan

    started = []
    original = plan.Plan._start

    def start(self: Any, *arguments: Any) -> Any:
        started.append(arguments[0])
        return original(self, *arguments)

    monkeypatch.setattr(plan.Plan, "_start", start)
    reduced = mode(gradients_of(make_variables(), QSGDCompressor()))
    for _ in range(2):
        reduced(*map(tf.constant, make_gradients(0)))
    assert started == [0, 0]


def test_no_exchange_waits_for_another_one() -> None:
    """TensorFlow keeps operations with side effects in the order of the program, unless they are called independent."""
    compressor = QSGDCompressor(exchange="allgather", fusion_elements=1000)
    raw = list(map(tf.constant, make_gradients(0)))
    graph = tf.function(gradients_of(make_variables(), compressor)).get_concrete_function(*raw).graph

    def above(operation: Any) -> set[Any]:
        """All that has to end before an operation begins."""
        seen: set[Any] = set()
        waiting = [operation]
        while waiting:
            parents = {x.op for x in waiting[-1].inputs} | set(waiting.pop().control_inputs)
            waiting += parents - seen
            seen |= parents
        return seen

    steps = [operation for operation in graph.get_operations() if operation.type == "PyFunc"]
    before = sorted(len(above(step) & set(steps)) for step in steps)
    exchanges = len(steps) // 2 - 1
    assert exchanges >= 8
    # The two operations that begin a run; what begins the exchanges has them above; what ends them also the beginning.
    assert before == [0, 1, *[2] * exchanges, *[3] * exchanges]
    conditions = [operation for operation in graph.get_operations() if operation.type in ("If", "StatelessIf")]
    assert len(conditions) == len(SHAPES)
    assert not any(above(condition) & set(conditions) for condition in conditions)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compressor", [IdentityCompressor, CastCompressor, TopKCompressor])
def test_other_codecs(compressor: Any, mode: Callable[..., Any]) -> None:
    compressor = compressor(error_feedback=False, exchange="allgather")
    reduced = mode(gradients_of(make_variables(), compressor))
    raw = make_gradients(0)
    assert_means(compressor.codec, reduced(*map(tf.constant, raw)), raw, NAMES, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"op": hvd.Sum}, hvd.size()),
        ({"gradient_predivide_factor": 2.0}, 1.0),
        ({"groups": 2}, 1.0),
        ({"groups": 1, "op": hvd.Sum}, hvd.size()),
    ],
    ids=str,
)
def test_settings_of_the_tape(settings: dict[str, Any], factor: float, mode: Callable[..., Any]) -> None:
    reduced = mode(gradients_of(make_variables(), QSGDCompressor(exchange="allgather"), **settings))
    for step in range(2):
        raw = make_gradients(step)
        assert_means(QSGD(), reduced(*map(tf.constant, raw)), raw, NAMES, step, factor=factor)


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_variables(mode: Callable[..., Any]) -> None:
    variables = make_variables()
    groups = [[variables[0], variables[1]], [variables[3]]]
    reduced = mode(gradients_of(variables, QSGDCompressor(exchange="allgather"), groups=groups))
    raw = make_gradients(0)
    # Stock Horovod tells variables apart by their names here, and these have to be different ones.
    variables = [tf.Variable(v, name=f"v{i}") for i, v in enumerate(variables)]
    groups = [[variables[0], variables[1]], [variables[3]]]
    reduced = mode(gradients_of(variables, QSGDCompressor(exchange="allgather"), groups=groups))
    assert_means(QSGD(), reduced(*map(tf.constant, raw)), raw, [f"v{i}" for i in range(5)], 0)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_dtypes(dtype: tf.DType) -> None:
    variables = make_variables(dtype)
    reduced = tf.function(gradients_of(variables, QSGDCompressor(exchange="allgather")))
    raw = [tf.cast(x, dtype) for x in make_gradients(0)]
    results = reduced(*raw)
    assert all(result.dtype == dtype for result in results)
    for i in (0, 2, 3):
        expected = reference_allgather(QSGD(), gather(raw[i]), NAMES[i], 0)
        assert_equal(results[i], tf.cast(expected, dtype))
    assert_same_on_all_ranks(results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients(sparse_as_dense: bool, mode: Callable[..., Any]) -> None:
    table, weight = tf.Variable(tf.zeros((100, 20)), name="table"), tf.Variable(tf.zeros((40, 50)), name="weight")
    compressor = QSGDCompressor(exchange="allgather")
    rows = tf.constant([1, 5, 1 + hvd.rank()])

    def step(weights: tf.Tensor, raw: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * weights) + tf.reduce_sum(weight * raw)
        tape = hvd.DistributedGradientTape(tape, compression=compressor, sparse_as_dense=sparse_as_dense)
        table_gradient, weight_gradient = tape.gradient(loss, [table, weight])
        return tf.convert_to_tensor(table_gradient), weight_gradient

    weights, raw = dyadic((3, 20)), normal((40, 50))
    table_gradient, weight_gradient = mode(step)(tf.constant(weights), tf.constant(raw))
    assert_equal(weight_gradient, reference_allgather(QSGD(), gather(raw), "weight", 0))
    dense = np.zeros((100, 20), np.float32)
    np.add.at(dense, rows.numpy(), weights)
    inputs = gather(dense)
    compressed = reference_allgather(QSGD(), inputs, "table", 0)
    assert_equal(table_gradient, compressed if sparse_as_dense else np.mean(inputs, axis=0))
    assert ("table" in compressor.stats().tensors) == sparse_as_dense


@pytest.mark.parametrize("mode", MODES)
def test_a_variable_without_a_gradient(mode: Callable[..., Any]) -> None:
    variables = make_variables()
    compressor = QSGDCompressor(exchange="allgather")

    def step(raw: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variables[2] * raw)
        return hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, variables)

    raw = normal(SHAPES[2])
    results = mode(step)(tf.constant(raw))
    assert [result is None for result in results] == [True, True, False, True, True]
    assert_equal(results[2], reference_allgather(QSGD(), gather(raw), "kernel", 0))


def test_two_models_in_one_function() -> None:
    """Like a GAN: the variables of both have the same names."""
    compressor = TopKCompressor(0.1)
    first, second = make_variables(), make_variables()
    reduced = tf.function(
        lambda *raw: (gradients_of(first, compressor)(*raw), gradients_of(second, compressor)(*(2 * x for x in raw)))
    )
    raw = make_gradients(0)
    names = ["kernel (4)", "bias (2)", "kernel (5)", "kernel (6)", "small (2)"]
    for results, expected, own in zip(reduced(*map(tf.constant, raw)), (NAMES, names), (1, 2), strict=True):
        assert_means(TopK(0.1), results, [own * x for x in raw], expected, 0)
    assert len(compressor.state_dict()["arrays"]) == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"groups": 1}, {"groups": 2}], ids=str)
def test_variables_that_share_a_gradient(settings: dict[str, Any], mode: Callable[..., Any]) -> None:
    """It may be the same tensor; still each has a residual of its own."""
    variables = [tf.Variable(tf.zeros((40, 50)), name="w") for _ in range(2)]
    compressor = TopKCompressor(0.1)

    def step(raw: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((variables[0] + variables[1]) * raw)
        return hvd.DistributedGradientTape(tape, compression=compressor, **settings).gradient(loss, variables)

    raw = normal((40, 50))
    for result, name in zip(mode(step)(tf.constant(raw)), ["w", "w (2)"], strict=True):
        assert_equal(result, reference_allgather(TopK(0.1), gather(raw), name, 0))
    assert set(compressor.state_dict()["arrays"]) == {"residual/w", "residual/w (2)"}


def test_a_loop_inside_the_graph() -> None:
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    compressor = TopKCompressor(0.01)

    @tf.function
    def train(raw: tf.Tensor) -> None:
        for _ in tf.range(5):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(variable - raw))
            tape = hvd.DistributedGradientTape(tape, compression=compressor)
            (gradient,) = tape.gradient(loss, [variable])
            variable.assign_sub(0.1 * gradient)

    train(tf.constant(normal((40, 50))))
    assert compressor.stats().tensors["w"].exchanges == 5
    assert compressor.state_dict()["steps"] == {"w": 4}
    assert_same_on_all_ranks([variable])
    assert np.count_nonzero(variable) >= 20


def test_a_loop_whose_turns_do_not_depend_on_each_other() -> None:
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    compressor = TopKCompressor(0.1)

    @tf.function
    def total(raw: tf.Tensor) -> tf.Tensor:
        result = tf.zeros((40, 50))
        for turn in tf.range(6):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variable * raw[turn])
            result += hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, [variable])[0]
        return result

    raw = np.stack([normal((40, 50), seed) for seed in range(6)])
    result = total(tf.constant(raw))
    assert_same_on_all_ranks([result])
    one_by_one = gradients_of([tf.Variable(tf.zeros((40, 50)), name="w")], TopKCompressor(0.1))
    assert_equal(result, sum(one_by_one(tf.constant(x))[0].numpy() for x in raw))
    assert compressor.state_dict()["steps"] == {"w": 5}


def test_an_error_in_one_run_leaves_the_next_one_whole() -> None:
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    compressor = QSGDCompressor(exchange="allgather")

    @tf.function
    def reduced(raw: tf.Tensor, fail: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * raw)
        result = hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, [variable])
        with tf.control_dependencies(result):
            tf.debugging.assert_equal(fail, False)
        return result

    raw = tf.constant(normal((40, 50)))
    reduced(raw, tf.constant(False))
    with pytest.raises(tf.errors.InvalidArgumentError):
        reduced(raw, tf.constant(True))
    assert_equal(reduced(raw, tf.constant(False))[0], reference_allgather(QSGD(), gather(raw), "w", 2))
