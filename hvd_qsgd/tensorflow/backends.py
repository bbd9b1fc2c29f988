"""Where gradients are encoded: on the CPU by Numba, or on their own device by operations of TensorFlow.

What a plan does between two collectives is Python, called by an operation of the graph. The backends differ in that
operation: ``tf.numpy_function`` lends it arrays of the host, ``tf.py_function`` tensors that stay on their device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from hvd_qsgd.codecs import Codec
from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.tensorflow.array import Array

#: TensorFlow takes over arrays that stand at multiples of it, and copies others.
ALIGNMENT = 64


class Backend(ABC):
    """How to call Python from a graph, and with what arrays."""

    #: Of :func:`hvd_qsgd.kernels.kernels_for`.
    name: ClassVar[str]

    def kernels(self, codec: Codec) -> Kernels:
        return kernels_for(codec, self.name)

    @abstractmethod
    def place(self) -> AbstractContextManager[Any]:
        """Around the operations of an exchange: their device."""

    @abstractmethod
    def call(self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], types: Any, stateful: bool = True) -> Any:
        """Add an operation to the current graph that calls a function of arrays or tensors."""

    @abstractmethod
    def empty(self, length: int, dtype: str) -> Any:
        """An array to be written to."""

    @abstractmethod
    def array(self, value: Any) -> Any:
        """An array of what an operation was given."""

    @abstractmethod
    def value(self, array: Any) -> Any:
        """What an operation returns for an array."""


class Host(Backend):
    """NumPy arrays and the kernels of Numba; without a copy for tensors that are on the CPU."""

    name = "numba"

    def place(self) -> AbstractContextManager[Any]:
        return tf.device("/cpu:0")

    def call(self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], types: Any, stateful: bool = True) -> Any:
        return tf.numpy_function(function, inputs, types, stateful=stateful)

    def empty(self, length: int, dtype: str) -> np.ndarray:
        """An array that TensorFlow takes over without a copy."""
        size = length * np.dtype(dtype).itemsize
        memory = np.empty(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size].view(dtype)

    def array(self, value: np.ndarray) -> np.ndarray:
        return value

    def value(self, array: Any) -> Any:
        return array


class Device(Backend):
    """Tensors of one device, "" for TensorFlow's choice, and the kernels that XLA compiles.

    Payloads go to wherever Horovod has a collective for them.
    """

    name = "tensorflow"

    def __init__(self, device: str) -> None:
        self._device = device

    def place(self) -> AbstractContextManager[Any]:
        return tf.device(self._device) if self._device else nullcontext()

    def call(self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], types: Any, stateful: bool = True) -> Any:
        return tf.py_function(function, inputs, types)

    def empty(self, length: int, dtype: str) -> Array:
        return Array.empty(length, dtype)

    def array(self, value: tf.Tensor) -> Array:
        return Array(value)

    def value(self, array: Any) -> Any:
        return array.tensor if isinstance(array, Array) else array


HOST = Host()


def device_of(tensor: Any, variable: Any = None) -> str:
    """Where a tensor is, or where the variable is whose gradient it is; "" if TensorFlow has not decided yet."""
    return str(getattr(tensor, "device", "") or getattr(variable, "device", "") or "")


def is_accelerator(device: str) -> bool:
    """Whether tensors of a device are out of NumPy's reach; without a device they go to a GPU, if there is one."""
    kind = tf.DeviceSpec.from_string(device).device_type
    return kind != "CPU" if kind else bool(tf.config.list_logical_devices("GPU"))
