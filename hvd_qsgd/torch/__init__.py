"""Compressors for Horovod with PyTorch.

from hvd_qsgd.torch import QSGDCompressor
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=QSGDCompressor)
"""

from hvd_qsgd.torch.compressor import (
    CastCompressor,
    Compressor,
    IdentityCompressor,
    QSGDCompressor,
    TopKCompressor,
)

__all__ = ["CastCompressor", "Compressor", "IdentityCompressor", "QSGDCompressor", "TopKCompressor"]
