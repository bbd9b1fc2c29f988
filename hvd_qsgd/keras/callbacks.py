"""Callbacks for Keras 3, with the names of Horovod's."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the weights and the optimizer state of one of them, at the end of the first batch.

    Before that batch a model may have no weights. States of random generators stay different.

    Args:
        root_rank: whose variables are sent.
        process_set: whose ranks take part.
    """

    def __init__(self, root_rank: int = 0, process_set: Any = hvd.global_process_set) -> None:
        super().__init__()
        self._root_rank = root_rank
        self._process_set = process_set
        self._done = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._done:
            return
        variables = [*self.model.weights, *self.model.optimizer.variables]
        values = {id(variable.value): variable.value for variable in variables}
        hvd.broadcast_variables(list(values.values()), root_rank=self._root_rank, process_set=self._process_set)
        self._done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the metrics of an epoch by their mean over the ranks, for the callbacks that come after it.

    Args:
        process_set: whose ranks take part.
    """

    def __init__(self, process_set: Any = hvd.global_process_set) -> None:
        super().__init__()
        self._process_set = process_set

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not logs:
            return
        names = sorted(logs)
        mine = tf.constant([float(logs[name]) for name in names], tf.float64)
        means = hvd.allreduce(mine, name="hvd_qsgd.metrics", process_set=self._process_set)
        logs.update(zip(names, means.numpy().tolist()))
