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
from hvd_qsgd.torch.family import (
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
)

__all__ = [
    "CastCompressor",
    "Compressor",
    "EliasQSGDCompressor",
    "GlobalTopKCompressor",
    "IdentityCompressor",
    "QSGDCompressor",
    "RandomKCompressor",
    "RowTopKCompressor",
    "SignCompressor",
    "ThresholdTopKCompressor",
    "TopKCompressor",
]
