"""Compressors for Horovod with PyTorch.

    from hvd_qsgd.torch import QSGDCompressor
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=QSGDCompressor)

Each takes the settings of its codec, and those of all compressors.
"""

from hvd_qsgd.torch.compressor import (
    CastCompressor,
    Compressor,
    IdentityCompressor,
    QSGDCompressor,
    TopKCompressor,
)
from hvd_qsgd.torch.dgc import DGCCompressor
from hvd_qsgd.torch.family import (
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
)
from hvd_qsgd.torch.state import CompressorStateHandler

__all__ = [
    "CastCompressor",
    "Compressor",
    "CompressorStateHandler",
    "DGCCompressor",
    "EliasQSGDCompressor",
    "GlobalTopKCompressor",
    "IdentityCompressor",
    "IntSGDCompressor",
    "PowerSGDCompressor",
    "QSGDCompressor",
    "RandomKCompressor",
    "RowTopKCompressor",
    "SignCompressor",
    "ThresholdTopKCompressor",
    "TopKCompressor",
]
