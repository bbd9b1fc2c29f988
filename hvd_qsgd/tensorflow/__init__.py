"""Compressors for Horovod with TensorFlow.

    from hvd_qsgd.tensorflow import QSGDCompressor
    tape = hvd.DistributedGradientTape(tape, compression=QSGDCompressor)

Each takes the settings of its codec, and those of all compressors.
"""

from hvd_qsgd.tensorflow.versions import check_versions

check_versions()

from hvd_qsgd.tensorflow.family import *  # noqa: E402, F403  (only versions that work can be imported)
