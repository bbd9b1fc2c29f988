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
    """An optimizer like ``optimizer`` that applies the mean of all ranks' gradients.

    It is of a subclass of the class of ``optimizer``, with the same name and configuration, so a saved model can be
    loaded without Horovod. Wrap a ``LossScaleOptimizer`` from outside: ranks must agree on which steps overflow.

    Args:
        optimizer: its variables must not be built yet.
        compression: a compressor of :mod:`hvd_qsgd.keras` or ``hvd.Compression``.
        op: hvd.Average or hvd.Sum.
        backward_passes_per_step: add up the gradients of so many calls before they are exchanged and applied.
        average_aggregated_gradients: divide that sum by the number of calls.
        sparse_as_dense, gradient_predivide_factor, groups, process_set: see ``hvd.DistributedGradientTape``;
            groups of variables are given as their ``.value``.

    Raises:
        ConfigError: the optimizer has ``gradient_accumulation_steps``, or a setting is out of range.
        UnsupportedError: an operation other than Average and Sum; when called, inside of a function that XLA compiles
            or of another LossScaleOptimizer.
    """
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError("DistributedOptimizer works with op=hvd.Average and op=hvd.Sum only.")
    if backward_passes_per_step < 1:
        raise ConfigError(f"backward_passes_per_step={backward_passes_per_step} must be 1 or more.")
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if inner.gradient_accumulation_steps:
        raise ConfigError(
            f"The optimizer has gradient_accumulation_steps={inner.gradient_accumulation_steps}, so the gradients of "
            f"each of these steps would be exchanged. Use DistributedOptimizer(..., backward_passes_per_step="
            f"{inner.gradient_accumulation_steps}, average_aggregated_gradients=True) instead."
        )
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
    base = type(optimizer)
    divisor = backward_passes_per_step if average_aggregated_gradients else 1

    class Distributed(base):  # type: ignore[misc, valid-type]
        def build(self, variables: Sequence[Any]) -> None:
            super().build(variables)
            self._sums = [
                tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name="sum")
                for v in (variables if backward_passes_per_step > 1 else [])
            ]
            self._passes = tf.Variable(0, trainable=False, name="passes")

        def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
            _check_caller(self)
            check_not_compiled()
            variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
            if not self.built:
                with tf.init_scope():
                    self.build(variables)
            if backward_passes_per_step == 1:
                super().apply(self._reduced(grads, variables), variables)
            else:
                self._apply_sums(grads, variables)

        def _reduced(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
            return list(reduce(list(grads), [getattr(v, "value", v) for v in variables]))

        def _apply_sums(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
            sums = [self._sums[self._get_variable_index(v)] for v in variables]
            for total, grad in zip(sums, grads):
                if grad is not None:
                    total.assign_add(tf.convert_to_tensor(grad))
            self._passes.assign_add(1)

            def step() -> None:
                means = [
                    None if grad is None else total / tf.cast(divisor, total.dtype) for total, grad in zip(sums, grads)
                ]
                super(Distributed, self).apply(self._reduced(means, variables), variables)
                for total in sums:
                    total.assign(tf.zeros_like(total))
                self._passes.assign(0)

            tf.cond(self._passes >= backward_passes_per_step, step, lambda: None)

    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    Distributed.__module__ = base.__module__
    distributed: keras.optimizers.Optimizer = Distributed.from_config(optimizer.get_config())
    return distributed


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
