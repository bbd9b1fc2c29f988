"""QSGD in TensorFlow operations. The bytes are specified by :mod:`hvd_qsgd.codecs.qsgd`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_qsgd.codecs.bits import planes_size
from hvd_qsgd.codecs.qsgd import FRACTION_BITS, INFINITY_BITS, NORM_LANES, QSGD, TINY
from hvd_qsgd.codecs.random_words import MULTIPLIER_1, MULTIPLIER_2
from hvd_qsgd.kernels.tensorflow.array import like, tensor_of
from hvd_qsgd.kernels.tensorflow.base import Compiled, TensorFlowKernels, bytes_of, key_halves, values_of
from hvd_qsgd.kernels.tensorflow.bits import pack_planes, unpack_planes

shift_right = tf.bitwise.right_shift
xor = tf.bitwise.bitwise_xor


def words(key: tf.Tensor, first: tf.Tensor, count: int) -> tf.Tensor:
    """:func:`hvd_qsgd.codecs.random_words.words` as uint32; ``key`` holds its low and its high half."""

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


def multiples_of(largest: int, divisor: int) -> np.ndarray:
    """``level * (1 / divisor)`` for the levels ``-largest .. largest``, float32.

    A table, because XLA takes products of three factors in an order of its own.
    """
    return np.arange(-largest, largest + 1, dtype=np.float32) * (np.float32(1) / np.float32(divisor))


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
        # The last code is not used.
        table = multiples_of(codec.levels + 1, codec.levels)[1:]
        parts = [tf.zeros(0, tf.float32)]
        for rows, bucket in self._rows(tf.zeros(length)):
            count, width = rows.shape
            stride = planes_size(width, codec.bits)
            packed = tf.reshape(payload[at : at + count * stride], [count, stride])
            multiples = tf.gather(tf.constant(table), unpack_planes(packed, width, codec.bits))
            parts.append(tf.reshape(all_scales[bucket : bucket + count, None] * multiples, [-1]))
            at += count * stride
        return tf.concat(parts, axis=0)

    # -- lanes: see hvd_qsgd.exchanges.allreduce --------------------------------------------------

    def agree_into(self, x: Any, out: Any) -> None:
        out[:] = like(out, self.compiled_agree(tensor_of(x)))

    def to_lanes(self, x: Any, agreed: Any, ranks: int, out: Any, key: int = 0, first: int = 0) -> None:
        position = tf.constant(first, tf.int64)
        out[:] = like(out, self.compiled_to_lanes(tensor_of(x), tensor_of(agreed), ranks, key_halves(key), position))

    def from_lanes(self, sums: Any, agreed: Any, ranks: int, out: Any, count: int) -> None:
        table = tf.constant(multiples_of(self.codec.levels * ranks, self.codec.levels * count))
        out[:] = like(out, self.compiled_from_lanes(tensor_of(sums), tensor_of(agreed), ranks, table, len(out)))

    def agree(self, x: tf.Tensor) -> tf.Tensor:
        scales = [tf.zeros(0, tf.float32), *(self._scales(rows) for rows, _ in self._rows(x))]
        return tf.bitcast(tf.concat(scales, axis=0), tf.int32)

    def lanes(self, x: tf.Tensor, agreed: tf.Tensor, ranks: int, key: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        """int32 words: the levels of ``x`` on the agreed scales, added into lanes."""
        width = self.codec.lane_width(ranks)
        lanes = 32 // width
        weights = tf.constant([1 << (width * lane) for lane in range(lanes)], tf.int32)
        scales = tf.bitcast(agreed, tf.float32)
        start = first // self.codec.bucket_size
        words = [tf.zeros(0, tf.int32)]
        for rows, bucket in self._rows(x):
            count, length = rows.shape
            stride = -(-length // lanes)
            levels = self._levels(rows, scales[bucket : bucket + count], key, start + bucket)
            levels = tf.reshape(tf.pad(levels, [[0, 0], [0, lanes * stride - length]]), [count, lanes, stride])
            words.append(tf.reshape(tf.reduce_sum(levels * weights[:, None], axis=1), [-1]))
        return tf.concat(words, axis=0)

    def values(self, sums: tf.Tensor, agreed: tf.Tensor, ranks: int, table: tf.Tensor, length: int) -> tf.Tensor:
        """The inverse of :meth:`lanes` for a sum over ranks; ``table`` has the multiple of a scale for each sum."""
        width = self.codec.lane_width(ranks)
        lanes = 32 // width
        largest = ranks * self.codec.levels
        offset = sum(largest << (width * lane) for lane in range(lanes)) & 0xFFFFFFFF
        unsigned = tf.bitcast(sums, tf.uint32) + tf.constant(offset, tf.uint32)
        shifts = tf.constant([width * lane for lane in range(lanes)], tf.uint32)[:, None]
        scales = tf.bitcast(agreed, tf.float32)
        parts, at = [tf.zeros(0, tf.float32)], 0
        for rows, bucket in self._rows(tf.zeros(length)):
            count, size = rows.shape
            stride = -(-size // lanes)
            words = tf.reshape(unsigned[at : at + count * stride], [count, 1, stride])
            digits = tf.bitwise.bitwise_and(shift_right(words, shifts), tf.constant((1 << width) - 1, tf.uint32))
            multiples = tf.gather(table, tf.cast(tf.reshape(digits, [count, -1])[:, :size], tf.int32))
            parts.append(tf.reshape(scales[bucket : bucket + count, None] * multiples, [-1]))
            at += count * stride
        return tf.concat(parts, axis=0)

    @cached_property
    def compiled_agree(self) -> Any:
        return Compiled(self.agree)

    @cached_property
    def compiled_to_lanes(self) -> Any:
        return Compiled(self.lanes)

    @cached_property
    def compiled_from_lanes(self) -> Any:
        return Compiled(self.values)

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
