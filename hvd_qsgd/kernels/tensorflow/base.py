"""What kernels for payloads of fixed size share, in TensorFlow operations.

TensorFlow's arrays do not change, so here a codec is two pure functions: ``encode`` and
``decode``. XLA compiles them once for each length (``jit_compile=True``); ``*_into`` run them on arrays of
:mod:`hvd_qsgd.kernels.tensorflow.array`, whose tensors stay on their device, and on those of NumPy.

On the CPU TensorFlow takes subnormal numbers for zero, and so do these kernels there: buckets whose
scale is below 2^-100 may get other bytes than from NumPy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tensorflow as tf

from hvd_qsgd.codecs.base import Codec, Kernels, combine
from hvd_qsgd.kernels.tensorflow.array import like, tensor_of

MASK32 = 0xFFFFFFFF


class Compiled:
    """A function of tensors and other values that XLA compiles for each shape, type and value.

    TensorFlow would warn of a ``tf.function`` that is traced for many shapes, as of a mistake.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = tf.function(function, jit_compile=True, autograph=False)
        self._traces: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        key = tuple((tuple(x.shape), x.dtype) if tf.is_tensor(x) else x for x in arguments)
        if key not in self._traces:
            kinds = [tf.TensorSpec(x.shape, x.dtype) if tf.is_tensor(x) else x for x in arguments]
            self._traces[key] = self._function.get_concrete_function(*kinds)
        return self._traces[key](*(x for x in arguments if tf.is_tensor(x)))


@dataclass(frozen=True)
class TensorFlowKernels(Kernels):
    """Base of the kernels; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Codec

    @abstractmethod
    def encode(self, x: tf.Tensor, key: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        """The payload of ``x`` (float32, flat, of known length), uint8.

        Args:
            key: uint32 of shape (2,): the low and the high half of the key.
            first: int64: see :meth:`Kernels.encode_into`.
        """

    @abstractmethod
    def decode(self, payload: tf.Tensor, length: int) -> tf.Tensor:
        """The ``length`` float32 values of a payload, uint8 of known length."""

    @cached_property
    def compiled_encode(self) -> Any:
        """:meth:`encode`, compiled by XLA."""
        return Compiled(self.encode)

    @cached_property
    def compiled_decode(self) -> Any:
        """:meth:`decode`, compiled by XLA."""
        return Compiled(self.decode)

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        payload = self.compiled_encode(tensor_of(x), key_halves(key), tf.constant(first, tf.int64))
        self.codec.check_room(out, len(payload))
        out[: len(payload)] = like(out, payload)
        return len(payload)

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        self.codec.check_payload(payload, len(out))
        combine(out, like(out, self.compiled_decode(tensor_of(payload), len(out))), mode)

    def all_finite(self, x: Any) -> bool:
        return all_finite(x)


def all_finite(x: Any) -> bool:
    """:meth:`Kernels.all_finite`."""
    return bool(tf.reduce_all(tf.math.is_finite(tensor_of(x))))


def key_halves(key: int) -> tf.Tensor:
    """A 64-bit key as uint32 of shape (2,): the low and the high half."""
    return tf.constant([key & MASK32, key >> 32], tf.uint32)


def bytes_of(values: tf.Tensor) -> tf.Tensor:
    """The bits of 2- or 4-byte values as flat uint8."""
    return tf.reshape(tf.bitcast(values, tf.uint8), [-1])


def values_of(data: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The inverse of :func:`bytes_of`."""
    return tf.bitcast(tf.reshape(data, [-1, dtype.size]), dtype)
