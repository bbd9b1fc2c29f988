"""The checkers themselves: what cannot fail proves nothing."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import SHAPE, assert_equal
from rank_checks import assert_means, assert_same_on_all_ranks, dyadic, gradients_of, normal

from hvd_qsgd import QSGD


def test_equal_bits_pass() -> None:
    assert_same_on_all_ranks([normal(SHAPE, rank=0), np.float32("nan"), np.empty(0)])


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.int64])
def test_one_flipped_bit_on_one_rank_fails_on_all(dtype: tf.DType) -> None:
    array = tf.cast(100 * normal(SHAPE, rank=0), dtype).numpy()
    if hvd.rank() == hvd.size() - 1:
        array.view(np.uint8)[-1, -1] ^= 1
    with pytest.raises(AssertionError, match=f"ranks \\[{hvd.size() - 1}\\] differ"):
        assert_same_on_all_ranks([array])


def test_a_wrong_mean_is_found() -> None:
    raw = [dyadic((40, 50)), dyadic((50,))]
    means = [x.numpy() for x in hvd.grouped_allreduce([tf.constant(x) for x in raw])]
    assert_means(QSGD(), means[1:], raw[1:], ["b"], 0)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_means(QSGD(), means, raw, ["w", "b"], 0)
    means[1][3] = np.nextafter(means[1][3], np.float32(9))
    with pytest.raises(AssertionError, match="1 of 50 elements differ"):
        assert_means(QSGD(), means[1:], raw[1:], ["b"], 0)


def test_gradients_are_those_asked_for() -> None:
    variables = [tf.Variable(tf.ones(SHAPE)), tf.Variable(tf.ones(5))]
    raw = [dyadic(SHAPE, rank=0), dyadic((5,), rank=0)]
    for result, expected in zip(gradients_of(variables, hvd.Compression.none)(*map(tf.constant, raw)), raw):
        assert_equal(result, expected)
