"""What ``exchange_worker.py`` times, with TensorFlow and Keras 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_qsgd.tensorflow import CastCompressor, QSGDCompressor, TopKCompressor

__all__ = ["CastCompressor", "QSGDCompressor", "TopKCompressor", "barrier", "hvd", "one_tensor", "prepare", "training"]


def prepare() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    # One thread for the codec, while another one computes.
    tf.config.threading.set_inter_op_parallelism_threads(2)


def barrier() -> None:
    hvd.allreduce(tf.zeros(1), name="barrier")


def one_tensor(compression: Any, name: str, elements: int) -> Callable[[], object]:
    """A step that averages one tensor."""
    tf.random.set_seed(hvd.rank())
    x = tf.random.normal((elements // 1000, 1000))

    @tf.function
    def step() -> tf.Tensor:
        return hvd.allreduce(x, name=name, compression=compression)

    return step


def training(compression: Any, name: str, batch: int, pixels: int) -> Callable[[], object]:
    """A training step of ResNet-50; without any communication if ``compression`` is None."""
    tf.random.set_seed(0)
    shape = (pixels, pixels, 3)
    model = keras.applications.ResNet50(weights=None, input_shape=shape, classifier_activation=None)
    variables = [variable.value for variable in model.trainable_variables]
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    images, labels = tf.random.normal((batch, *shape)), tf.random.uniform((batch,), 0, 1000, tf.int32)

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        if compression is not None:
            tape = hvd.DistributedGradientTape(tape, compression=compression)
        for variable, gradient in zip(variables, tape.gradient(loss, variables)):
            variable.assign_sub(1e-4 * gradient)

    return step
