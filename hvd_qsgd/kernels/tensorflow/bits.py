"""Packing of small integers in TensorFlow operations; see :mod:`hvd_qsgd.codecs.bits`."""

from __future__ import annotations

import tensorflow as tf

from hvd_qsgd.codecs.bits import plane_widths


def pack_planes(codes: tf.Tensor, bits: int) -> tf.Tensor:
    """int32 codes of shape (rows, length) to uint8 of shape (rows, planes_size)."""
    rows, length = codes.shape
    planes, shift = [], 0
    for width in plane_widths(bits):
        slots = 8 // width
        stride = -(-length * width // 8)
        digits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(codes, shift), (1 << width) - 1)
        digits = tf.reshape(tf.pad(digits, [[0, 0], [0, slots * stride - length]]), [rows, slots, stride])
        weights = tf.constant([1 << (slot * width) for slot in range(slots)], tf.int32)
        planes.append(tf.reduce_sum(digits * weights[:, None], axis=1))
        shift += width
    return tf.cast(tf.concat(planes, axis=1), tf.uint8)


def unpack_planes(packed: tf.Tensor, length: int, bits: int) -> tf.Tensor:
    """The inverse of :func:`pack_planes`."""
    rows = packed.shape[0]
    data = tf.cast(packed, tf.int32)
    codes = tf.zeros([rows, length], tf.int32)
    column = shift = 0
    for width in plane_widths(bits):
        slots = 8 // width
        stride = -(-length * width // 8)
        shifts = tf.constant([slot * width for slot in range(slots)], tf.int32)[:, None]
        digits = tf.bitwise.right_shift(data[:, None, column : column + stride], shifts)
        digits = tf.reshape(tf.bitwise.bitwise_and(digits, (1 << width) - 1), [rows, slots * stride])[:, :length]
        codes = tf.bitwise.bitwise_or(codes, tf.bitwise.left_shift(digits, shift))
        column += stride
        shift += width
    return codes


def pack_bits(bits: tf.Tensor) -> tf.Tensor:
    """0/1 values, flat int32, to bytes with the first bit lowest."""
    count = bits.shape[0]
    padded = tf.reshape(tf.pad(bits, [[0, -count % 8]]), [-1, 8])
    return tf.cast(tf.reduce_sum(padded * tf.constant([1 << bit for bit in range(8)]), axis=1), tf.uint8)


def unpack_bits(packed: tf.Tensor) -> tf.Tensor:
    """The inverse of :func:`pack_bits`: int32 of 8 times the length."""
    bits = tf.bitwise.right_shift(tf.cast(packed, tf.int32)[:, None], tf.range(8))
    return tf.reshape(tf.bitwise.bitwise_and(bits, 1), [-1])
