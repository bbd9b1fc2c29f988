"""Arrays that can be written to, over tensors of TensorFlow, which cannot.

Exchanges and feedback write to slices of arrays, as NumPy and torch let them. Here an array is a run of elements of a
storage, and a storage is a list of parts laid end to end. A write replaces parts, and a read joins them, so tensors
stay on their device and are copied only where parts meet. Small parts may be NumPy arrays, such as
the words of a header.
"""

from __future__ import annotations

import bisect
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf


class Storage:
    """Elements of one dtype: parts, which are flat tensors or NumPy arrays, and where they start.

    Threads may read and write different elements at the same time.
    """

    def __init__(self, part: Any) -> None:
        self._parts = [part]
        self._starts = [0]
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> tf.Tensor:
        with self._lock:
            parts = self._between(start, stop) or [self._parts[0][:0]]
        return tf.convert_to_tensor(parts[0]) if len(parts) == 1 else tf.concat(parts, axis=0)

    def write(self, start: int, stop: int, part: Any) -> None:
        with self._lock:
            end = self._starts[-1] + len(self._parts[-1])
            self._parts = [*self._between(0, start), part, *self._between(stop, end)]
            self._starts = [0]
            for before in self._parts[:-1]:
                self._starts.append(self._starts[-1] + len(before))

    def _between(self, start: int, stop: int) -> list[Any]:
        """Parts that together are elements ``start .. stop - 1``; none is empty."""
        found = []
        first = bisect.bisect_right(self._starts, start) - 1
        for at, part in zip(self._starts[first:], self._parts[first:]):
            if at >= stop:
                break
            piece = part[max(start - at, 0) : stop - at] if start > at or stop < at + len(part) else part
            if len(piece):
                found.append(piece)
        return found


class Array:
    """A flat array of one of TensorFlow's devices, with those operations of NumPy's arrays that are needed.

    Args:
        tensor: flat; a tensor or a NumPy array.
    """

    #: Of the kernels that take such arrays.
    backend = "tensorflow"

    def __init__(self, tensor: Any) -> None:
        self.dtype = np.dtype(tensor.dtype.as_numpy_dtype if isinstance(tensor, tf.Tensor) else tensor.dtype)
        self._storage = Storage(tensor)
        self._start, self._stop = 0, len(tensor)

    @staticmethod
    def empty(length: int, dtype: str) -> Array:
        """An array to be written to."""
        return Array(tf.zeros(length, dtype))

    @property
    def tensor(self) -> tf.Tensor:
        """The elements as they are now."""
        return self._storage.read(self._start, self._stop)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def size(self) -> int:
        return len(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array: np.ndarray = np.array(self.tensor.numpy(), dtype)
        return array

    def tobytes(self) -> bytes:
        return np.asarray(self).tobytes()

    def tolist(self) -> list[Any]:
        return np.asarray(self).tolist()

    def copy(self) -> np.ndarray:
        """On the host."""
        return np.asarray(self)

    def view(self, dtype: Any) -> Array:
        """The memory as values of another dtype, by way of the host: for a few words."""
        return View(self, dtype)

    def norm(self) -> float:
        """The Euclidean norm."""
        return float(tf.norm(self.tensor))

    def new_tensor(self, values: Any) -> np.ndarray:
        """Values of the array's dtype."""
        return np.array(values, self.dtype)

    def __iter__(self) -> Iterator[Any]:
        return iter(np.asarray(self))

    def __getitem__(self, key: Any) -> Any:
        """A slice is a view; a number and an array of positions give values on the host."""
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            view = copy.copy(self)
            view._start, view._stop = self._start + start, self._start + max(start, stop)
            return view
        if isinstance(key, np.ndarray):
            return tf.gather(self.tensor, key).numpy()
        return self[key : key + 1].tensor.numpy()[0]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, np.ndarray):
            self[:] = tf.tensor_scatter_nd_update(self.tensor, key[:, None], value)
            return
        if key is Ellipsis:
            key = slice(None)
        elif not isinstance(key, slice):
            key = slice(key, key + 1)
        start, stop, _ = key.indices(len(self))
        if isinstance(value, Array):
            value = value.tensor
        elif np.ndim(value) == 0:
            value = np.full(stop - start, value, self.dtype)
        if len(value) != stop - start:
            raise ValueError(f"{len(value)} values do not fit into {stop - start} elements.")
        if len(value):
            self._storage.write(self._start + start, self._start + stop, value)

    def _combined(self, other: Any, function: Callable[[tf.Tensor, Any], tf.Tensor]) -> Array:
        return Array(function(self.tensor, other.tensor if isinstance(other, Array) else tf.cast(other, self.dtype)))

    def __add__(self, other: Any) -> Array:
        return self._combined(other, tf.add)

    def __sub__(self, other: Any) -> Array:
        return self._combined(other, tf.subtract)

    def __mul__(self, other: Any) -> Array:
        return self._combined(other, tf.multiply)

    def __truediv__(self, other: Any) -> Array:
        return self._combined(other, tf.divide)

    __radd__, __rmul__ = __add__, __mul__

    def __iadd__(self, other: Any) -> Array:
        self[:] = self + other
        return self

    def __isub__(self, other: Any) -> Array:
        self[:] = self - other
        return self

    def __imul__(self, other: Any) -> Array:
        self[:] = self * other
        return self

    def __itruediv__(self, other: Any) -> Array:
        self[:] = self / other
        return self


class View(Array):
    """See :meth:`Array.view`."""

    def __init__(self, of: Array, dtype: Any) -> None:
        super().__init__(np.asarray(of).view(dtype))
        self._of = of

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._of[:] = np.asarray(self).view(self._of.dtype)


def tensor_of(array: Any) -> tf.Tensor:
    """The tensor of an :class:`Array` or of NumPy's numbers."""
    return array.tensor if isinstance(array, Array) else tf.constant(array)


def like(array: Any, tensor: tf.Tensor) -> Any:
    """The tensor, or for a NumPy array its numbers."""
    return tensor if isinstance(array, Array) else tensor.numpy()
