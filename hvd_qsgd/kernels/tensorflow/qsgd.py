"""QSGD in TensorFlow operations. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvd_qsgd.codecs.bits import planes_size
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.kernels.tensorflow.base import TensorFlowKernels, bytes_of, values_of
from hvd_qsgd.kernels.tensorflow.bits import pack_planes, unpack_planes
from hvd_qsgd.random_words import MULTIPLIER_1, MULTIPLIER_2

shift_right = tf.bitwise.right_shift
xor = tf.bitwise.bitwise_xor


def words(key: tf.Tensor, first: tf.Tensor, count: int) -> tf.Tensor:
    """:func:`hvd_qsgd.random_words.words` as uint32; ``key`` holds its low and its high half."""

    def uint32(value: int) -> tf.Tensor:
        return tf.constant(value, tf.uint32)

    h = tf.cast(tf.range(count), tf.uint32) + (first + key[0])
    h = xor(h, shift_right(h, uint32(16))) * uint32(MULTIPLIER_1)
    h = (xor(h, shift_right(h, uint32(15))) + key[1]) * uint32(MULTIPLIER_2)
    return xor(h, shift_right(h, uint32(15)))


def l2_norms(rows: tf.Tensor) -> tf.Tensor:
    """:func:`hvd_qsgd.codecs.qsgd.l2_norms`: the same sums in the same order."""
    padded = tf.square(tf.cast(tf.pad(rows, [[0, 0], [0, -rows.shape[1] % NORM_LANES]]), tf.float64))
    sums = tf.zeros([rows.shape[0], NORM_LANES], tf.float64)
    for start in range(0, padded.shape[1], NORM_LANES):
        sums += padded[:, start : start + NORM_LANES]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return tf.cast(tf.sqrt(sums[:, 0]), tf.float32)


@dataclass(frozen=True)
class QSGDKernels(TensorFlowKernels):
    """TensorFlow implementation of a QSGD codec; see :class:`hvd_qsgd.kernels.tensorflow.base.TensorFlowKernels`."""

    codec: QSGD

    def encode(self, x: tf.Tensor, key: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        size = self.codec.bucket_size
        start = first // size
        all_scales, all_codes = [], []
        for rows, bucket in self._rows(x):
            scales = self._scales(rows)
            levels = self._levels(rows, scales, key, start + bucket)
            all_scales.append(bytes_of(scales))
            all_codes.append(tf.reshape(pack_planes(levels + self.codec.levels, self.codec.bits), [-1]))
        return tf.concat([tf.zeros(0, tf.uint8), *all_scales, *all_codes], axis=0)

    def decode(self, payload: tf.Tensor, length: int) -> tf.Tensor:
        codec = self.codec
        at = 4 * codec.buckets(length)
        all_scales = values_of(payload[:at], tf.float32)
        # A table, because XLA takes products of three factors in an order of its own. The last code is not used.
        codes = np.arange(-codec.levels, codec.levels + 2, dtype=np.float32)
        table = codes * (np.float32(1) / np.float32(codec.levels))
        parts = [tf.zeros(0, tf.float32)]
        for rows, bucket in self._rows(tf.zeros(length)):
            count, width = rows.shape
            stride = planes_size(width, codec.bits)
            packed = tf.reshape(payload[at : at + count * stride], [count, stride])
            multiples = tf.gather(tf.constant(table), unpack_planes(packed, width, codec.bits))
            parts.append(tf.reshape(all_scales[bucket : bucket + count, None] * multiples, [-1]))
            at += count * stride
        return tf.concat(parts, axis=0)

    def _rows(self, x: tf.Tensor) -> Iterator[tuple[tf.Tensor, int]]:
        """The full buckets, then the tail: (rows, number of the first bucket)."""
        length, size = x.shape[0], self.codec.bucket_size
        full = length // size
        if full:
            yield tf.reshape(x[: full * size], [full, size]), 0
        if full * size < length:
            yield x[None, full * size :], full

    def _scales(self, rows: tf.Tensor) -> tf.Tensor:
        """:meth:`hvd_qsgd.codecs.qsgd.QSGD.scales`."""
        magnitudes = tf.bitwise.bitwise_and(tf.bitcast(rows, tf.int32), 0x7FFFFFFF)
        largest = tf.reduce_max(magnitudes, axis=1)
        scales = tf.bitcast(largest, tf.float32) if self.codec.norm == "max" else l2_norms(rows)
        return tf.where((largest >= INFINITY_BITS) | tf.math.is_inf(scales), float("nan"), scales)

    def _levels(self, rows: tf.Tensor, scales: tf.Tensor, key: tf.Tensor, bucket: tf.Tensor) -> tf.Tensor:
        s = self.codec.levels
        usable = (scales > 0) & (scales < float("inf"))
        lift = tf.where(scales < float(TINY), float(1 / TINY), 1.0)
        factor = tf.constant(float(s << FRACTION_BITS)) / tf.where(usable, scales * lift, 1.0)
        fixed = tf.round((tf.where(usable[:, None], rows, 0.0) * lift[:, None]) * factor[:, None])
        value = tf.cast(fixed, tf.int32) + self._fractions(rows, key, bucket) + (s << FRACTION_BITS)
        return shift_right(value, FRACTION_BITS) - s

    def _fractions(self, rows: tf.Tensor, key: tf.Tensor, bucket: tf.Tensor) -> tf.Tensor:
        count, length = rows.shape
        if self.codec.rounding == "nearest":
            return tf.fill([count, length], 1 << (FRACTION_BITS - 1))
        per_bucket = self.codec.bucket_size // 2
        start = tf.cast(tf.bitwise.bitwise_and(bucket * per_bucket, 0xFFFFFFFF), tf.uint32)
        drawn = words(key, start, count * per_bucket)
        drawn = tf.reshape(drawn, [count, per_bucket])[:, : -(-length // 2)]
        low = tf.bitwise.bitwise_and(drawn, tf.constant(0xFFFF, tf.uint32))
        pairs = tf.concat([low, shift_right(drawn, tf.constant(16, tf.uint32))], axis=1)
        return tf.cast(pairs[:, :length], tf.int32)
