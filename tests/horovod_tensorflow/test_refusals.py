"""What cannot work raises an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod
import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from rank_checks import MODES, dyadic, gradients_of, normal

from hvd_qsgd import QSGD
from hvd_qsgd.errors import ConfigError, ExchangeError, SetupError, UnsupportedError
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.tensorflow import CastCompressor, Compressor, QSGDCompressor, TopKCompressor
from hvd_qsgd.tensorflow.versions import check_versions

SHAPE = (40, 50)
#: What is raised while a graph runs has a type of TensorFlow's.
FAILED = (ExchangeError, tf.errors.OpError)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", [hvd.Adasum, hvd.Min, hvd.Max, hvd.Product])
def test_operations_that_are_not_linear(op: Any, mode: Callable[..., Any]) -> None:
    x = tf.constant(normal(SHAPE))
    with pytest.raises(UnsupportedError, match=r"op=(Adasum|Min|Max|Product) cannot be combined"):
        mode(lambda x: hvd.allreduce(x, name="x", op=op, compression=QSGDCompressor))(x)
    with pytest.raises(UnsupportedError, match="cannot be combined"):
        mode(lambda x: hvd.grouped_allreduce([x], name="x", op=op, compression=QSGDCompressor))(x)
    with pytest.raises(UnsupportedError, match="cannot be combined"):
        mode(gradients_of([tf.Variable(x, name="w")], QSGDCompressor, op=op))(x)


@pytest.mark.parametrize("mode", MODES)
def test_reducescatter(mode: Callable[..., Any]) -> None:
    x = tf.constant(normal(SHAPE))
    with pytest.raises(UnsupportedError, match="reducescatter cannot be combined"):
        mode(lambda x: hvd.reducescatter(x, compression=QSGDCompressor))(x)
    with pytest.raises(UnsupportedError, match="reducescatter cannot be combined"):
        mode(lambda x: hvd.grouped_reducescatter([x], compression=QSGDCompressor))(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_through_the_exchange(mode: Callable[..., Any]) -> None:
    variable = tf.Variable(normal(SHAPE))

    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(hvd.allreduce(variable * 2.0, name="x", compression=QSGDCompressor))
        return tape.gradient(loss, variable)

    with pytest.raises(UnsupportedError, match=r"not differentiable"):
        mode(step)()


def test_xla() -> None:
    x, compressor = tf.constant(normal(SHAPE)), QSGDCompressor()
    with pytest.raises(UnsupportedError, match="jit_compile=False"):
        tf.function(lambda x: hvd.allreduce(x, name="x", compression=compressor), jit_compile=True)(x)
    with pytest.raises(UnsupportedError, match="jit_compile=False"):
        tf.function(gradients_of([tf.Variable(x, name="w")], QSGDCompressor()), jit_compile=True)(x)


@pytest.mark.parametrize("mode", MODES)
def test_error_feedback_without_a_name(mode: Callable[..., Any]) -> None:
    x = tf.constant(dyadic(SHAPE))
    with pytest.raises(UnsupportedError, match="without a name"):
        mode(lambda x: hvd.allreduce(x, compression=TopKCompressor))(x)
    with pytest.raises(UnsupportedError, match="without a name"):
        mode(lambda x: hvd.grouped_allreduce([x], compression=TopKCompressor))(x)


@pytest.mark.parametrize("compression", [QSGDCompressor, TopKCompressor(), CastCompressor()])
def test_compress_by_hand(compression: Any) -> None:
    with pytest.raises(UnsupportedError, match="was not called by a function of Horovod"):
        compression.compress(tf.constant(dyadic(SHAPE)))


def by_rank(rank_0: Compressor, others: Compressor) -> Compressor:
    return rank_0 if hvd.rank() == 0 else others


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "compressor",
    [
        *(by_rank(QSGDCompressor(4, exchange=e), QSGDCompressor(5, exchange=e)) for e in exchanges_for(QSGD())),
        by_rank(QSGDCompressor(exchange="scatter_gather"), QSGDCompressor(exchange="allreduce")),
        by_rank(TopKCompressor(0.01), TopKCompressor(0.02)),
        by_rank(TopKCompressor(0.01), QSGDCompressor(exchange="allgather")),
        by_rank(QSGDCompressor(min_elements=3000), QSGDCompressor(min_elements=10)),
        by_rank(QSGDCompressor(), QSGDCompressor(fusion_elements=600)),
    ],
    ids=range(8),
)
def test_settings_that_differ_between_ranks(compressor: Compressor, mode: Callable[..., Any]) -> None:
    variables = [tf.Variable(tf.zeros(SHAPE), name="w"), tf.Variable(tf.zeros((100, 40)), name="v")]
    raw = [tf.constant(normal(v.shape)) for v in variables]
    for _ in range(2):
        with pytest.raises(FAILED, match="All ranks must run the same model with the same compressor settings"):
            mode(gradients_of(variables, compressor))(*raw)
    with pytest.raises(FAILED, match="All ranks must run the same model"):
        mode(lambda x: hvd.allreduce(x, name="x", compression=compressor))(raw[1])


@pytest.mark.parametrize(
    ("module", "version", "works"), [(tf, "2.19.0", "TensorFlow 2.18"), (horovod, "0.27.0", "Horovod 0.28")]
)
def test_versions(module: Any, version: str, works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions()
    monkeypatch.setattr(module, "__version__", version)
    with pytest.raises(SetupError, match=f"{version} is installed.*{works}"):
        check_versions()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_have_changed_since_tracing(mode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_qsgd.collectives.horovod_tensorflow import HorovodCollectives

    compressor = QSGDCompressor()
    reduce = mode(lambda x: hvd.allreduce(x, name="x", compression=compressor))
    reduce(tf.constant(normal(SHAPE)))
    monkeypatch.setattr(HorovodCollectives, "ranks", property(lambda self: 99))
    with pytest.raises(FAILED, match="There are 99 ranks, and this graph was traced for"):
        reduce(tf.constant(normal(SHAPE)))


def test_a_compressor_of_a_single_trace() -> None:
    @tf.function
    def reduced(x: tf.Tensor) -> tf.Tensor:
        return hvd.allreduce(x, name="x", compression=QSGDCompressor(8))

    with pytest.raises(ConfigError, match=r"made while a tf\.function was traced\..* Make it outside"):
        reduced(tf.ones((40, 50)))
