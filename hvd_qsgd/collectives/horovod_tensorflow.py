"""Collectives over Horovod with TensorFlow: as operations of a graph, and at once for NumPy arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops

from hvd_qsgd.collectives.base import Names, OfProcessSet
from hvd_qsgd.exchanges.base import AllToAll, Request, phase_of

#: The types of what goes into a collective of each kind.
INPUTS: dict[str, list[tf.DType]] = {
    "allgather": [tf.uint8],
    "alltoall": [tf.uint8, tf.int32],
    "max": [tf.int32],
    "sum": [tf.int32],
    "sum_float": [tf.float32],
}


def operation_name(phase: str, name: str) -> str:
    """The name that Horovod's torch functions would make of it."""
    kind = phase if phase in ("allgather", "alltoall") else "allreduce"
    return re.sub(r"[^A-Za-z0-9_.\-/]", "_", f"{kind}.{Names.of(name)}")


def emit(phase: str, name: str, inputs: Sequence[tf.Tensor], process_set: Any) -> list[tf.Tensor]:
    """Add a collective to the current graph.

    Args:
        phase: see :attr:`hvd_qsgd.exchanges.Exchange.phases`.
        inputs: the array; for "alltoall" also the bytes for each rank.

    Returns:
        The array that came; for "alltoall" also the bytes from each rank.
    """
    settings: dict[str, Any] = {"name": operation_name(phase, name), "process_set": process_set}
    if phase == "allgather":
        return [hvd.allgather(inputs[0], **settings)]
    if phase == "alltoall":
        return list(hvd.alltoall(inputs[0], splits=inputs[1], **settings))
    return [mpi_ops._allreduce(inputs[0], op=hvd.Max if phase == "max" else hvd.Sum, **settings)]


def inputs_of(request: Request) -> list[Any]:
    """What :func:`emit` takes, as arrays."""
    if isinstance(request, AllToAll):
        return [request.array, np.array(request.splits, np.int32)]
    return [request.array]


def outcome_of(phase: str, outputs: Sequence[Any]) -> Any:
    """What an exchange is resumed with, from the arrays of what :func:`emit` gave."""
    return (outputs[0], np.asarray(outputs[1]).tolist()) if phase == "alltoall" else outputs[0]


@dataclass
class Finished:
    """A collective that has ended; see :class:`hvd_qsgd.collectives.base.Handle`."""

    outcome: Any

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.outcome


class HorovodCollectives(OfProcessSet):
    """The ranks of a Horovod process set, for collectives outside of any graph; they return when they have ended."""

    def __init__(self, process_set: Any = hvd.global_process_set) -> None:
        super().__init__(process_set)
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}

    def start(self, request: Request) -> Finished:
        phase = phase_of(request)
        with tf.init_scope(), tf.device("/cpu:0"):
            # TensorFlow gives operations their names in graphs only.
            function = self._functions.get((phase, request.name))
            if function is None:

                def collective(*inputs: tf.Tensor) -> list[tf.Tensor]:
                    return emit(phase, request.name, inputs, self.process_set)

                # One trace is all that there is, and TensorFlow must not count it with those of other collectives.
                function = self._functions[phase, request.name] = tf.function(
                    collective, autograph=False
                ).get_concrete_function(*(tf.TensorSpec([None], dtype) for dtype in INPUTS[phase]))
            inputs = [tf.constant(np.asarray(array), dtype) for array, dtype in zip(inputs_of(request), INPUTS[phase])]
            return Finished(outcome_of(phase, [output.numpy() for output in function(*inputs)]))
