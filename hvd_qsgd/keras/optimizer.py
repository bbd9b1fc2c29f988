"""A distributed optimizer for Keras 3."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_qsgd.errors import ConfigError, UnsupportedError
from hvd_qsgd.tensorflow.callsite import check_not_compiled


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: keras.optimizers.Optimizer,
    *,
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    groups: Any = None,
    process_set: Any = hvd.global_process_set,
) -> keras.optimizers.Optimizer:
    """Make an optimizer apply the mean of all ranks' gradients from now on.

    The same object is returned, with its state, settings and class, so training goes on where it was, and a saved
    model can be loaded without Horovod. Compile a model with it that was compiled before. Wrap a
    ``LossScaleOptimizer`` from outside: ranks must agree on which steps overflow.

    Args:
        optimizer: any of Keras 3, new or of a model that was loaded.
        compression: a compressor of :mod:`hvd_qsgd.keras` or ``hvd.Compression``.
        op: hvd.Average or hvd.Sum.
        backward_passes_per_step: add up the gradients of so many calls before they are exchanged and applied.
        average_aggregated_gradients: divide that sum by the number of calls.
        sparse_as_dense, gradient_predivide_factor, groups, process_set: see ``hvd.DistributedGradientTape``;
            groups of variables are given as their ``.value``.

    Raises:
        ConfigError: the optimizer has ``gradient_accumulation_steps``, or a setting is out of range.
        UnsupportedError: an operation other than Average and Sum; no optimizer of Keras 3, or one that is distributed
            already; when called, inside of a function that XLA compiles or of another LossScaleOptimizer, or an
            optimizer that changes variables in other ways than by ``apply``.
    """
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError("DistributedOptimizer works with op=hvd.Average and op=hvd.Sum only.")
    if backward_passes_per_step < 1:
        raise ConfigError(f"backward_passes_per_step={backward_passes_per_step} must be 1 or more.")
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UnsupportedError(
            f"DistributedOptimizer got {optimizer!r}, which is not an optimizer of Keras 3. Give it an object like "
            f"keras.optimizers.SGD(); for tf-keras use horovod.keras.DistributedOptimizer."
        )
    _check_parts([optimizer, *_inner_of(optimizer)])
    reduce = hvd._make_allreduce_grads_fn(
        f"Distributed{type(optimizer).__name__}",
        "",
        "",
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        groups,
        process_set,
    )
    optimizer._distribution = Distribution(optimizer, reduce, backward_passes_per_step, average_aggregated_gradients)
    return optimizer


class Distribution:
    """What exchanges the gradients of one optimizer before it applies them.

    It puts itself before methods of that object, because another object, made of the configuration, would lack all
    that a configuration does not hold: state, exclusions, a learning rate that is a function.

    Args:
        reduce: Horovod's function that makes gradients to their mean.
        passes: gradients that are added up before an exchange.
        average: whether the sum is divided by their number.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, reduce: Any, passes: int, average: bool) -> None:
        self._optimizer, self._reduce = optimizer, reduce
        self._passes, self._divisor = passes, passes if average else 1
        self._build, self._apply, self._apply_gradients = optimizer.build, optimizer.apply, optimizer.apply_gradients
        self._calls = 0
        if optimizer.built:
            self._make_sums(optimizer._trainable_variables)
        optimizer.build, optimizer.apply, optimizer.apply_gradients = self.build, self.apply, self.apply_gradients

    def build(self, variables: Sequence[Any]) -> None:
        self._build(variables)
        _check_parts(_inner_of(self._optimizer))
        self._make_sums(variables)

    def _make_sums(self, variables: Sequence[Any]) -> None:
        """Attributes of the optimizer, so that tf.train.Checkpoint finds them; Keras saves only its own."""
        if self._passes > 1 and not hasattr(self._optimizer, "_horovod_sums"):
            self._optimizer._horovod_sums = [
                tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name="sum") for v in variables
            ]
            self._optimizer._horovod_passes = tf.Variable(0, trainable=False, name="passes")

    def apply_gradients(self, *args: Any, **settings: Any) -> Any:
        before = self._calls
        result = self._apply_gradients(*args, **settings)
        if self._calls == before:
            raise UnsupportedError(
                f"{type(self._optimizer).__name__}.apply_gradients() did not call apply(), which is where gradients "
                f"are exchanged, so each rank would go its own way. Let it end in super().apply_gradients(); to add "
                f"gradients up, use DistributedOptimizer(..., backward_passes_per_step=)."
            )
        return result

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        optimizer = self._optimizer
        _check_caller(optimizer)
        check_not_compiled()
        self._calls += 1
        variables = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)
        if not optimizer.built:
            with tf.init_scope():
                optimizer.build(variables)
        if self._passes == 1:
            self._apply(self._reduced(grads, variables), variables)
        else:
            self._apply_sums(grads, variables)

    def _reduced(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        return list(self._reduce(list(grads), [of_tensorflow(v) for v in variables]))

    def _apply_sums(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        optimizer = self._optimizer
        optimizer._check_variables_are_known(variables)
        sums = [optimizer._horovod_sums[optimizer._get_variable_index(v)] for v in variables]
        for total, grad in zip(sums, grads):
            if grad is not None:
                total.assign_add(tf.convert_to_tensor(grad))
        optimizer._horovod_passes.assign_add(1)

        def step() -> None:
            means = [
                None if grad is None else total / tf.cast(self._divisor, total.dtype)
                for total, grad in zip(sums, grads)
            ]
            self._apply(self._reduced(means, variables), variables)
            for total in sums:
                total.assign(tf.zeros_like(total))
            optimizer._horovod_passes.assign(0)

        tf.cond(optimizer._horovod_passes >= self._passes, step, lambda: None)


def of_tensorflow(variable: Any) -> Any:
    """What a variable of Keras wraps; one of TensorFlow itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """All variables of an optimizer, and what is added up for its next exchange."""
    added = getattr(optimizer, "_horovod_sums", None)
    return optimizer.variables + ([] if added is None else [*added, optimizer._horovod_passes])


def _inner_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The optimizers that an optimizer hands its gradients to, as far as its attributes tell."""
    found: list[Any] = []
    under_way = [optimizer]
    while under_way:
        for value in vars(under_way.pop()).values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, keras.optimizers.Optimizer) and all(inner is not o for o in [optimizer, *found]):
                    found.append(inner)
                    under_way.append(inner)
    return found


def _check_parts(optimizers: Sequence[Any]) -> None:
    for optimizer in optimizers:
        if hasattr(optimizer, "_distribution"):
            raise UnsupportedError(
                f"DistributedOptimizer was called before for {optimizer.name!r}: gradients would be exchanged twice. "
                f"It changes the optimizer that it gets: use that one as it is, and make a new one for another model "
                f"or other settings."
            )
        if getattr(optimizer, "gradient_accumulation_steps", None):
            raise ConfigError(
                f"The optimizer has gradient_accumulation_steps={optimizer.gradient_accumulation_steps}, so the "
                f"gradients of each of these steps would be exchanged. Use DistributedOptimizer(..., "
                f"backward_passes_per_step={optimizer.gradient_accumulation_steps}, "
                f"average_aggregated_gradients=True) instead."
            )


def _check_caller(optimizer: Any) -> None:
    """Refuse surroundings in which ranks would wait for each other for ever."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and caller is not optimizer:
            raise UnsupportedError(
                "A LossScaleOptimizer is wrapped around a DistributedOptimizer, so a rank whose gradients overflow "
                "would leave the others waiting. Wrap it the other way round: "
                "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)). (With the mixed_float16 policy "
                "model.compile() wraps whatever is not a LossScaleOptimizer.)"
            )
        frame = frame.f_back
