"""The further codecs and kinds of feedback in TensorFlow's graphs, against the same exchange among simulated ranks."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import assert_equal
from rank_checks import assert_same_on_all_ranks, gather, gradients_of, normal

from hvd_qsgd import IntSGD, PowerSGD
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import Job, Piece, choose_exchange, start_exchange
from hvd_qsgd.feedback import EF21, ErrorFeedback, LoCo
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.policies import WarmUp
from hvd_qsgd.tensorflow import (
    Compressor,
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    QSGDCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
    TopKCompressor,
)

SHAPES = {"a": (40, 50), "b": (30, 41)}
MAKERS: list[Any] = [
    SignCompressor,
    lambda: SignCompressor(64, exchange="scatter_gather"),
    lambda: RandomKCompressor(0.1),
    lambda: RandomKCompressor(0.2, unbiased=True, exchange="allgather"),
    EliasQSGDCompressor,
    lambda: EliasQSGDCompressor(scaled=True, exchange="scatter_gather"),
    lambda: RowTopKCompressor(0.1, 64, exchange="scatter_gather"),
    lambda: GlobalTopKCompressor(0.1),
    lambda: ThresholdTopKCompressor(0.1, every=3),
    lambda: ThresholdTopKCompressor(0.1, method="sidco-gamma"),
    lambda: TopKCompressor(0.1, error_feedback=EF21()),
    lambda: TopKCompressor(0.1, error_feedback=ErrorFeedback("int8")),
    lambda: QSGDCompressor(3, error_feedback=LoCo(reset=3), exchange="allreduce"),
]


class Simulated:
    """All ranks of this job in one process."""

    def __init__(self, compressor: Compressor) -> None:
        self.codec, self.number = compressor.codec, 0
        fed = self.codec.biased if compressor.error_feedback is None else compressor.error_feedback
        self.feedback = [compressor.feedback.fresh() for _ in range(hvd.size())] if fed else None
        self.exchange = choose_exchange(compressor.exchange, self.codec, hvd.size())
        self.memories: list[dict[str, dict[str, Any]]] = [{name: {} for name in SHAPES} for _ in range(hvd.size())]

    def step(self, inputs: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        jobs = []
        for rank in range(hvd.size()):
            pieces = []
            # Last layers first.
            for name in reversed(SHAPES):
                x = inputs[name][rank].reshape(-1)
                x = x.copy() if self.feedback is None else self.feedback[rank].correct(name, x, hvd.size())
                stream = stream_of(0, 0 if self.codec.shared_randomness else rank, name)
                memory = self.memories[rank][name]
                fed = self.feedback is not None
                pieces.append(Piece(name, x, np.empty_like(x), stream, self.number, 0, fed, SHAPES[name], memory))
            jobs.append(Job("job", pieces, kernels_for(self.codec, "numba"), rank, hvd.size(), np.empty))
        simulate([start_exchange(self.exchange, job) for job in jobs])
        if self.feedback is not None:
            for kind, job in zip(self.feedback, jobs):
                for piece in job.pieces:
                    kind.keep(piece.name, piece.x, piece.out)
        self.number += 1
        return {piece.name: piece.out.reshape(SHAPES[piece.name]) for piece in jobs[0].pieces}


def run(compressor: Compressor, steps: range) -> list[list[np.ndarray]]:
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
    reduced = tf.function(gradients_of(variables, compressor))
    return [[g.numpy() for g in reduced(*(tf.constant(normal(s, n)) for s in SHAPES.values()))] for n in steps]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: repr(make()))
def test_steps_are_those_of_simulated_ranks_also_after_a_restart(make: Any) -> None:
    before, after = make(), make()
    expected = Simulated(before)

    def check(compressor: Compressor, steps: range) -> None:
        for number, results in zip(steps, run(compressor, steps), strict=True):
            means = expected.step({name: gather(normal(shape, number)) for name, shape in SHAPES.items()})
            assert_same_on_all_ranks(results)
            for result, name in zip(results, SHAPES, strict=True):
                if expected.exchange == "linear":
                    # Horovod may add floats in another order.
                    np.testing.assert_allclose(result, means[name], atol=1e-6)
                else:
                    assert_equal(result, means[name])

    check(before, range(3))
    after.deserialize(before.serialize())
    check(after, range(3, 6))


def test_what_needs_torch_is_refused() -> None:
    for codec in (PowerSGD(), IntSGD(), WarmUp([SignCompressor().codec])):
        with pytest.raises(ConfigError, match="is for torch only"):
            Compressor(codec)
