"""Whether all ranks mean the same: asked anew in each run, before anything else is sent.

Horovod compares the names, types and shapes of what ranks reduce, and raises on all of them where they differ. It
cannot compare what payloads are made of. So each run begins with an allreduce of two words, a hash of all that ranks
must agree on and its complement: their maxima are those of this rank only if all ranks have the same hash. It needs no
gradient, and in a graph it is done while the forward pass is. As nothing is compared when a graph is traced, a rank may
trace by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops

from hvd_qsgd.collectives.horovod_tensorflow import operation_name
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.reduction.agreement import check_settings, check_words, settings_message


@dataclass(frozen=True)
class Meeting:
    """The allreduce in which ranks meet that call the same function of Horovod.

    Attributes:
        name: that Horovod would give the one tensor of the call, so that a rank which leaves it to Horovod does not
            match, by Horovod's own comparison; None for several tensors, which all ranks begin in this way.
        ignores_scope: whether Horovod would leave out the name scope.
    """

    name: str | None = None
    ignores_scope: bool = False

    def emit(self, words: tf.Tensor, process_set: Any) -> tf.Tensor:
        """Add it to the current graph, or run it. Outside of graphs Horovod matches calls by their order."""
        with tf.device("/cpu:0"):
            return mpi_ops._allreduce(
                words,
                name=self._node(process_set),
                op=hvd.Max,
                ignore_name_scope=self.ignores_scope,
                process_set=process_set,
            )

    def attend(self, words: np.ndarray, graph: Any, process_set: Any) -> np.ndarray:
        """Take part at once, under the name that the operation will have in a graph that is traced."""
        if graph is None:
            return np.asarray(self.emit(tf.constant(words), process_set))
        name = graph.unique_name(self._node(process_set), mark_as_used=False)
        meeting = Meeting(name.rpartition("/")[2] if self.ignores_scope else name)
        with tf.init_scope():
            run = tf.function(lambda preflight_words: meeting.emit(preflight_words, process_set), autograph=False)
            return np.asarray(run.get_concrete_function(tf.TensorSpec([2], tf.int32))(tf.constant(words)))

    def _node(self, process_set: Any) -> str:
        if self.name is None:
            return operation_name("max", f"set{process_set.process_set_id}.preflight")
        # TensorFlow numbers the second operation of a name, so this one must not have the name that Horovod's will have
        # if both leave out their scopes.
        return f"preflight/{self.name}" if self.ignores_scope else self.name


class Preflight:
    """What this rank means by the exchange of some tensors.

    Args:
        settings: that must be equal on all ranks, "tensors" among them.
        process_set: whose ranks take part.
    """

    def __init__(self, settings: Mapping[str, Any], process_set: Any) -> None:
        self._settings = settings
        self._process_set = process_set
        self.words = np.array(check_words(settings), np.int32)

    def check(self, largest: np.ndarray) -> None:
        """Raise ExchangeError, on all ranks, unless all have the same words, of which these are the largest."""
        if np.array_equal(largest, self.words):
            return
        # With a rank that has joined nothing can be gathered.
        with tf.init_scope(), tf.device("/cpu:0"), contextlib.suppress(tf.errors.OpError):
            # Not named, as no rank does anything else, and no function, for which there may be no thread.
            gathered = hvd.allgather(tf.constant(settings_message(self._settings)), process_set=self._process_set)
            check_settings(self._settings, gathered.numpy())
        raise ExchangeError(
            f"The ranks do not mean the same exchange: here it is {self._settings}. All ranks must run the same model "
            f"with the same compressor settings."
        )
