"""Identity and half precision in TensorFlow operations."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from hvd_qsgd.codecs.cast import NAN_BITS, Cast
from hvd_qsgd.codecs.identity import Identity
from hvd_qsgd.kernels.tensorflow.base import TensorFlowKernels, bytes_of, values_of


@dataclass(frozen=True)
class IdentityKernels(TensorFlowKernels):
    codec: Identity

    def encode(self, x: tf.Tensor, key: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        return bytes_of(x)

    def decode(self, payload: tf.Tensor, length: int) -> tf.Tensor:
        return values_of(payload, tf.float32)


@dataclass(frozen=True)
class CastKernels(TensorFlowKernels):
    codec: Cast

    def encode(self, x: tf.Tensor, key: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        halves = tf.bitcast(tf.cast(x, tf.as_dtype(self.codec.dtype)), tf.uint16)
        nan = tf.constant(NAN_BITS[self.codec.dtype], tf.uint16)
        return bytes_of(tf.where(tf.math.is_nan(x), nan, halves))

    def decode(self, payload: tf.Tensor, length: int) -> tf.Tensor:
        return tf.cast(values_of(payload, tf.as_dtype(self.codec.dtype)), tf.float32)
