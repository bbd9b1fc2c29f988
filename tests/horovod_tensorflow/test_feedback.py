"""Error feedback, and what a checkpoint keeps of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import assert_equal, decoded, key
from rank_checks import MODES, assert_same_on_all_ranks, gather, gradients_of, normal

from hvd_qsgd import QSGD, Codec, TopK
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.tensorflow import Compressor, QSGDCompressor, TopKCompressor

SHAPE = (40, 50)


def make(compressor: Compressor, mode: Callable[..., Any] = MODES[1]) -> Callable[..., Any]:
    return mode(gradients_of([tf.Variable(tf.zeros(SHAPE), name="w")], compressor))


def simulate(codec: Codec, inputs: list[list[np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Means of all steps and the last residual of each rank, by the definition; ``inputs[step][rank]``."""
    residuals = [np.zeros(SHAPE, np.float32) for _ in inputs[0]]
    means = []
    for step, of_ranks in enumerate(inputs):
        total: Any = None
        for rank, x in enumerate(of_ranks):
            corrected = x + residuals[rank]
            payload = decoded(codec, corrected, key("w", rank, step))
            residuals[rank] = corrected - payload
            total = payload if total is None else total + payload
        means.append(total / np.float32(len(of_ranks)))
    return means, residuals


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "compressor",
    [
        lambda: TopKCompressor(0.1),
        lambda: TopKCompressor(0.1, fusion_elements=100),
        lambda: QSGDCompressor(rounding="nearest", exchange="allgather", fusion_elements=1000),
        lambda: QSGDCompressor(exchange="allgather", error_feedback=True),
    ],
    ids=range(4),
)
def test_against_the_definition(compressor: Callable[[], Compressor], mode: Callable[..., Any]) -> None:
    compressor = compressor()
    reduced = make(compressor, mode)
    inputs = [gather(normal(SHAPE, step)) for step in range(4)]
    means, residuals = simulate(compressor.codec, inputs)
    for step, mean in enumerate(means):
        (result,) = reduced(tf.constant(normal(SHAPE, step)))
        assert_equal(result, mean)
        assert_same_on_all_ranks([result])
    assert_equal(compressor.state_dict()["arrays"]["residual/w"].reshape(SHAPE), residuals[hvd.rank()])


@pytest.mark.parametrize("exchange", ["scatter_gather", "allreduce"])
def test_what_was_lost_comes_later(exchange: str) -> None:
    """Sum of the means + mean of the residuals = sum of the inputs, also where shards are rounded twice."""
    compressor = QSGDCompressor(rounding="nearest", exchange=exchange)
    reduced = make(compressor)
    total, wanted = np.zeros(SHAPE), np.zeros(SHAPE)
    for step in range(4):
        total += reduced(tf.constant(normal(SHAPE, step)))[0].numpy()
        wanted += np.mean(gather(normal(SHAPE, step)), axis=0)
    residuals = gather(compressor.state_dict()["arrays"]["residual/w"])
    np.testing.assert_allclose(total + np.mean(residuals, axis=0).reshape(SHAPE), wanted, atol=1e-5)


def test_residuals_survive_retracing_and_another_function() -> None:
    compressor = TopKCompressor(0.1)
    variable = tf.Variable(tf.zeros(SHAPE), name="w")
    means, _ = simulate(TopK(0.1), [gather(normal(SHAPE, step)) for step in range(3)])
    for step, mean in enumerate(means):
        reduced = tf.function(gradients_of([variable], compressor))
        assert_equal(reduced(tf.constant(normal(SHAPE, step)))[0], mean)


@pytest.mark.parametrize("exchange", ["allgather", "allreduce"])
def test_a_step_that_is_not_finite_leaves_residuals_as_they_were(exchange: str) -> None:
    compressor = QSGDCompressor(rounding="nearest", exchange=exchange)
    reduced = make(compressor)
    reduced(tf.constant(normal(SHAPE)))
    before = compressor.state_dict()["arrays"]["residual/w"]
    spoiled = normal(SHAPE, 1)
    if hvd.rank() == 0:
        spoiled[5, 5] = np.nan
    assert np.isnan(reduced(tf.constant(spoiled))[0]).any()
    assert_equal(compressor.state_dict()["arrays"]["residual/w"], before)


def train(compressor: Compressor, variable: tf.Variable, steps: range) -> None:
    reduced = tf.function(gradients_of([variable], compressor))
    for step in steps:
        variable.assign_sub(reduced(tf.constant(normal(SHAPE, step)))[0])


@pytest.mark.parametrize("restore_first", [True, False])
@pytest.mark.parametrize(
    "make_compressor", [lambda: TopKCompressor(0.05), lambda: QSGDCompressor(error_feedback=True)], ids=["topk", "qsgd"]
)
def test_resuming_equals_an_uninterrupted_run(
    tmp_path: Path, make_compressor: Callable[[], Compressor], restore_first: bool
) -> None:
    expected, variable = tf.Variable(tf.zeros(SHAPE), name="w"), tf.Variable(tf.zeros(SHAPE), name="w")
    train(make_compressor(), expected, range(6))

    compressor = make_compressor()
    train(compressor, variable, range(3))
    checkpoint = tf.train.Checkpoint(variable=variable, compression=compressor)
    path = checkpoint.save(str(tmp_path / f"rank{hvd.rank()}"))

    resumed, compressor = tf.Variable(tf.ones(SHAPE), name="w"), make_compressor()
    if not restore_first:
        train(compressor, tf.Variable(tf.zeros(SHAPE), name="w"), range(2))
        compressor.reset()
    tf.train.Checkpoint(variable=resumed, compression=compressor).restore(path).assert_consumed()
    train(compressor, resumed, range(3, 6))
    assert_equal(resumed, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda compressor: pickle.loads(pickle.dumps(compressor))])
def test_copies_go_on_like_the_original(copied: Callable[[Any], Any]) -> None:
    """As where a launcher sends a compressor to its ranks."""
    original = TopKCompressor(0.1)
    hvd.allreduce(normal((40, 50)), name="x", compression=original)
    copies = [copied(original), original]
    means = [hvd.allreduce(normal((40, 50), 1), name="x", compression=compressor) for compressor in copies]
    assert_equal(*means)
    assert_equal(*[compressor.state_dict()["arrays"]["residual/x"] for compressor in copies])


def test_a_checkpoint_of_another_codec(tmp_path: Path) -> None:
    compressor = TopKCompressor(0.05)
    path = tf.train.Checkpoint(compression=compressor).save(str(tmp_path / f"rank{hvd.rank()}"))
    with pytest.raises(ConfigError, match="Use the settings of the saved run"):
        tf.train.Checkpoint(compression=TopKCompressor(0.1)).restore(path)


def test_state_dict_is_a_copy_and_comes_back() -> None:
    compressor, other = TopKCompressor(0.1), TopKCompressor(0.1)
    reduced = make(compressor)
    reduced(tf.constant(normal(SHAPE)))
    state = compressor.state_dict()
    kept = state["arrays"]["residual/w"].copy()
    (expected,) = reduced(tf.constant(normal(SHAPE, 1)))
    assert_equal(state["arrays"]["residual/w"], kept)
    other.load_state_dict(state)
    assert_equal(make(other)(tf.constant(normal(SHAPE, 1)))[0], expected)
    assert compressor.codec != QSGD()
