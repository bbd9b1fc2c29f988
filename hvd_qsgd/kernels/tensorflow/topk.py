"""TopK in TensorFlow operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.codecs.topk import INFINITY_BITS, TopK
from hvd_qsgd.kernels.tensorflow.array import tensor_of
from hvd_qsgd.kernels.tensorflow.base import Compiled, all_finite


@dataclass(frozen=True)
class TopKKernels(Kernels):
    """The search among all values is compiled by XLA; the few values that it finds go to the host, which packs them."""

    codec: TopK

    def largest(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """What to keep of ``x`` (float32, flat, of known length).

        Returns:
            Positions of the largest magnitudes, the largest first and of equal ones those that stand first; how
            many magnitudes are not zero; whether all values are finite.
        """
        magnitudes = tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), 0x7FFFFFFF)
        positions = tf.math.top_k(magnitudes, self.codec.kept(x.shape[0])).indices
        return positions, tf.math.count_nonzero(magnitudes), tf.reduce_all(magnitudes < INFINITY_BITS)

    @cached_property
    def compiled_largest(self) -> Any:
        """:meth:`largest`, compiled by XLA."""
        return Compiled(self.largest)

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        if not len(x):
            return self.codec.encode_into(np.empty(0, np.float32), out)
        positions, nonzero, finite = self.compiled_largest(tensor_of(x))
        kept = np.sort(positions.numpy()[: int(nonzero)].astype(np.int64))
        return self.codec.write(x, kept, out) if finite else self.codec.write_not_finite(out)

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        self.codec.decode_into(np.asarray(payload), out, mode)

    def prepare_decode(self, payload: Any, length: int) -> Looks[Callable[[Any, str], None]]:
        return self.codec.prepare_decode(np.asarray(payload), length)

    def all_finite(self, x: Any) -> bool:
        return all_finite(x)
