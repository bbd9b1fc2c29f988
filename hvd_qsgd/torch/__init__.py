"""Compressors for Horovod with PyTorch.

    from hvd_qsgd.torch import QSGDCompressor
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=QSGDCompressor)

Each takes the settings of its codec, and those of all compressors.
"""

from hvd_qsgd.torch.dgc import DGCCompressor as DGCCompressor
from hvd_qsgd.torch.family import *  # noqa: F403
from hvd_qsgd.torch.state import CompressorStateHandler as CompressorStateHandler
