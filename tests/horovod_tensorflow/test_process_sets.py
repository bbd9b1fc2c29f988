"""Process sets: only their ranks exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import SHAPE, assert_equal, reference_allgather
from rank_checks import MODES, assert_same_on_all_ranks, gather, gradients_of, normal

from hvd_qsgd import QSGD
from hvd_qsgd.tensorflow import IdentityCompressor, QSGDCompressor, RandomKCompressor

pytestmark = pytest.mark.ranks(4)


@pytest.mark.parametrize("mode", MODES)
def test_two_halves(mode: Callable[..., Any]) -> None:
    sets = [hvd.add_process_set([0, 2]), hvd.add_process_set([1, 3])]
    own, other = sets[hvd.rank() % 2], sets[1 - hvd.rank() % 2]
    compressor = QSGDCompressor(exchange="allgather")
    variable = tf.Variable(tf.zeros((40, 50)), name="w")
    raw = normal((40, 50))
    reduced = mode(gradients_of([variable], compressor, process_set=own))
    mine = mode(lambda x: hvd.allreduce(x, name="x", compression=compressor, process_set=own))
    # Ranks outside of a process set trace its exchanges as well, and leave their gradients as they are.
    others = mode(gradients_of([variable], compressor, process_set=other))
    for step in range(2):
        for result, name in ((reduced(tf.constant(raw))[0], "w"), (mine(tf.constant(raw)), "x")):
            # Random words are drawn by a key that tells groups of ranks apart.
            key = f"{name} (ranks {own.ranks[0]},{own.ranks[1]})"
            assert_equal(result, reference_allgather(QSGD(), gather(raw, own), key, step))
            assert_same_on_all_ranks([result], own)
        assert_equal(others(tf.constant(raw))[0], raw)
    hvd.allreduce(tf.zeros(1), name="all")
    for process_set in sets:
        hvd.remove_process_set(process_set)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_some_ranks_first(mode: Callable[..., Any]) -> None:
    """Ranks that took part know more variables of one name than others, and have made more exchanges."""
    some = hvd.add_process_set([0, 2])
    for compressor in (QSGDCompressor(exchange="allgather"), RandomKCompressor(0.5, error_feedback=False)):
        raw = normal(SHAPE)
        for process_set in (some, hvd.global_process_set):
            variables = [tf.Variable(tf.zeros(SHAPE), name="w") for _ in range(2)]
            reduced = mode(gradients_of(variables, compressor, process_set=process_set))
            results = reduced(tf.constant(raw), tf.constant(2 * raw))
            if process_set.included():
                assert_same_on_all_ranks(results, process_set)
                if compressor.codec == QSGD():
                    base = "w" if process_set is not some else "w (ranks 0,2)"
                    for result, factor, name in zip(results, (1, 2), (base, f"{base} (2)")):
                        inputs = gather(factor * raw, process_set)
                        assert_equal(result, reference_allgather(QSGD(), inputs, name, 0))
    hvd.allreduce(tf.zeros(1), name="all")
    hvd.remove_process_set(some)


@pytest.mark.parametrize("exchange", ["allgather", "auto"])
def test_an_id_that_is_given_again(exchange: str) -> None:
    compressor = IdentityCompressor(exchange=exchange)
    x = tf.constant(normal(SHAPE))
    before, ids = None, []
    for ranks in ([0, 1], [0, 1], [0, 2]):
        some = hvd.add_process_set(ranks)
        reduce = tf.function(lambda x, some=some: hvd.allreduce(x, name="x", compression=compressor, process_set=some))
        if some.included():
            expected = np.sum(gather(x, some), axis=0) / 2
            for result in (reduce(x), hvd.allreduce(x, name="x", compression=compressor, process_set=some)):
                assert_equal(result, expected)
            if before is not None and exchange == "allgather":
                with pytest.raises(tf.errors.OpError, match="A process set was removed since this graph was traced"):
                    before(x)
            before = reduce
        ids.append(some.process_set_id)
        hvd.allreduce(tf.zeros(1), name="all")
        hvd.remove_process_set(some)
    assert len(set(ids)) < len(ids)
    # What was cached for a set goes when another one is exchanged for.
    hvd.allreduce(x, name="x", compression=compressor)
    assert len(compressor._plans) == 1
