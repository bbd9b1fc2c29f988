"""Callbacks for Keras 3, with the names of Horovod's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.keras.optimizer import of_tensorflow, variables_of


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the weights and the optimizer state of one of them.

    They are sent before the first batch if all ranks have them by then, so that a model which only ``root_rank``
    loaded goes on as it was saved; what is made in the first batch is sent after it. States of random generators
    stay different.

    Args:
        root_rank: whose variables are sent.
        process_set: whose ranks take part.

    Raises:
        ExchangeError: the ranks do not have the same variables.
    """

    def __init__(self, root_rank: int = 0, process_set: Any = hvd.global_process_set) -> None:
        super().__init__()
        self._root_rank = root_rank
        self._process_set = process_set
        #: Shapes and types of what was sent.
        self._sent: list[str] | None = None
        self._done = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # And not when training begins, because later callbacks may load weights then.
        if self._done:
            return
        optimizers = _optimizers(self.model)
        mine = [
            all(layer.built for layer in self.model._flatten_layers()),
            [f"{name}={type(optimizer).__name__}" for name, optimizer in optimizers.items()],
            [name for name, optimizer in optimizers.items() if optimizer.built],
        ]
        models, kinds, built = zip(*_everywhere("built", mine, self._process_set))
        self._compare("optimizers", kinds)
        # Which variables an optimizer is built for is known of one only; the others have to wait for the first batch.
        others = [{*names} - {"optimizer"} for names in built]
        if not all(models) or any(names != others[0] for names in others):
            return
        if any("optimizer" in names for names in built) and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self._send()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self._done:
            self._send()
            self._done = True

    def _send(self) -> None:
        variables = _variables(self.model)
        described = [f"{variable.dtype.name}{list(variable.shape)}" for variable in variables]
        self._compare("variables", _everywhere("variables", described, self._process_set))
        if described != self._sent:
            _broadcast(variables, self._root_rank, self._process_set)
            self._sent = described

    def _compare(self, what: str, ranks: Sequence[list[str]]) -> None:
        for rank, other in enumerate(ranks):
            if other != ranks[0]:
                mine, its = next(pair for pair in itertools.zip_longest(ranks[0], other) if pair[0] != pair[1])
                raise ExchangeError(
                    f"The ranks have different {what}, so that those of rank {self._root_rank} cannot be sent to all: "
                    f"rank 0 has {len(ranks[0])} and rank {rank} has {len(other)}, of which the first that differ are "
                    f"{mine or 'missing'} and {its or 'missing'}. All ranks must make the same model and compile it "
                    f"with the same optimizer and settings, also where only one of them loads it from a file."
                )


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the metrics of an epoch by their mean over the ranks, for the callbacks that come after it.

    Arrays are averaged element by element. What is not a number, such as a string or None, stays as it is on each
    rank.

    Args:
        process_set: whose ranks take part.

    Raises:
        ExchangeError: the ranks have metrics of other names or shapes.
    """

    def __init__(self, process_set: Any = hvd.global_process_set) -> None:
        super().__init__()
        self._process_set = process_set

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = {} if logs is None else logs
        mine = {name: array for name, value in logs.items() if (array := _numbers(value)) is not None}
        ranks = _everywhere("metrics", mine, self._process_set)
        shapes = [{name: array.shape for name, array in metrics.items()} for metrics in ranks]
        for rank, other in enumerate(shapes):
            if other != shapes[0]:
                names = sorted(name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name))
                raise ExchangeError(
                    f"The ranks have different metrics, of which no mean can be taken: {names} of rank 0 and rank "
                    f"{rank} have the shapes {[shapes[0].get(name) for name in names]} and "
                    f"{[other.get(name) for name in names]}, where None is a metric that the rank does not have. "
                    f"Give all ranks the same metrics, and validation data to all or none of them; "
                    f"model.evaluate() after training may run on one rank."
                )
        for name, array in mine.items():
            mean = np.mean([metrics[name].astype(np.float64) for metrics in ranks], axis=0)
            if array.ndim == 0:
                logs[name] = float(mean)
            else:
                logs[name] = mean.astype(array.dtype if array.dtype.kind not in "biu" else np.float64)


def _numbers(value: Any) -> np.ndarray | None:
    """A metric as an array; None if it is not made of numbers."""
    try:
        array = np.asarray(value)
        array.astype(np.float64)
    except (TypeError, ValueError):
        return None
    return None if array.dtype.kind in "OSUMmc" else array


def _optimizers(model: keras.Model) -> dict[str, Any]:
    """All that a model has as attributes, by name: more than one where it has a train_step of its own."""
    return {name: value for name, value in sorted(vars(model).items()) if isinstance(value, keras.optimizers.Optimizer)}


def _variables(model: keras.Model) -> list[Any]:
    """Those of TensorFlow that hold the weights and the state of all optimizers."""
    found = list(model.weights)
    for optimizer in _optimizers(model).values():
        found += variables_of(optimizer)
    return list({id(variable): variable for variable in map(of_tensorflow, found)}.values())


def _everywhere(what: str, mine: Any, process_set: Any) -> list[Any]:
    """An object of each rank."""
    gathered: list[Any] = hvd.allgather_object(mine, name=f"hvd_qsgd.keras.{what}", process_set=process_set)
    return gathered


def _broadcast(variables: Sequence[tf.Variable], root_rank: int, process_set: Any) -> None:
    """Like ``hvd.broadcast_variables``, which goes by names, and names of layers depend on what a rank made before."""

    @tf.function
    def broadcast() -> None:
        for i, variable in enumerate(variables):
            name = f"hvd_qsgd.keras.variables.{i}"
            variable.assign(hvd.broadcast(variable, root_rank, name=name, process_set=process_set))

    broadcast()
