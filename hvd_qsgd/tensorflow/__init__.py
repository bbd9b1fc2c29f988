"""Compressors for Horovod with TensorFlow.

from hvd_qsgd.tensorflow import QSGDCompressor
tape = hvd.DistributedGradientTape(tape, compression=QSGDCompressor)
"""

from hvd_qsgd.tensorflow.versions import check_versions

check_versions()

from hvd_qsgd.tensorflow.compressor import (  # noqa: E402  (only versions that work can be imported)
    CastCompressor,
    Compressor,
    IdentityCompressor,
    QSGDCompressor,
    TopKCompressor,
)

__all__ = ["CastCompressor", "Compressor", "IdentityCompressor", "QSGDCompressor", "TopKCompressor"]
