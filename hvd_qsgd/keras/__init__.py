"""Horovod for Keras 3 on TensorFlow, with and without compression; stock Horovod 0.28.1 knows Keras 2 only.

    import horovod.tensorflow as hvd
    from hvd_qsgd.keras import BroadcastGlobalVariablesCallback, DistributedOptimizer, QSGDCompressor

    model.compile(DistributedOptimizer(optimizer, compression=QSGDCompressor), loss, jit_compile=False)
    model.fit(..., callbacks=[BroadcastGlobalVariablesCallback(0)])

With tf-keras (``TF_USE_LEGACY_KERAS=1``) use ``horovod.keras`` and ``hvd_qsgd.tensorflow``.
"""

from hvd_qsgd.keras.versions import check_keras

check_keras()

# Only with a Keras that works.
from hvd_qsgd.keras.callbacks import BroadcastGlobalVariablesCallback as BroadcastGlobalVariablesCallback  # noqa: E402
from hvd_qsgd.keras.callbacks import MetricAverageCallback as MetricAverageCallback  # noqa: E402
from hvd_qsgd.keras.optimizer import DistributedOptimizer as DistributedOptimizer  # noqa: E402
from hvd_qsgd.tensorflow.family import *  # noqa: E402, F403
