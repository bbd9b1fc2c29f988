"""Process sets: only their ranks exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from expectations import assert_equal, reference_allgather
from rank_checks import MODES, assert_same_on_all_ranks, gather, gradients_of, normal

from hvd_qsgd import QSGD
from hvd_qsgd.tensorflow import QSGDCompressor

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
            assert_equal(result, reference_allgather(QSGD(), gather(raw, own), name, step))
            assert_same_on_all_ranks([result], own)
        assert_equal(others(tf.constant(raw))[0], raw)
    hvd.allreduce(tf.zeros(1), name="all")
    for process_set in sets:
        hvd.remove_process_set(process_set)
