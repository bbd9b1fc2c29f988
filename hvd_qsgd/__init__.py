"""Gradient compression for stock Horovod.

    from hvd_qsgd.torch import QSGDCompressor
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=QSGDCompressor)

Importing this package imports NumPy at most; frameworks and Horovod are imported by the
subpackages that need them, when they need them.
"""

from hvd_qsgd.codecs import (
    QSGD,
    Cast,
    Codec,
    EliasQSGD,
    GlobalTopK,
    Identity,
    IntSGD,
    MinMax,
    PowerSGD,
    RandomK,
    Rows,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
    codec_from_config,
)
from hvd_qsgd.errors import (
    ConfigError,
    ExchangeError,
    HvdQsgdError,
    PayloadError,
    SetupError,
    UnsupportedError,
)

__version__ = "0.1.0"

__all__ = [
    "QSGD",
    "Cast",
    "Codec",
    "ConfigError",
    "EliasQSGD",
    "ExchangeError",
    "GlobalTopK",
    "HvdQsgdError",
    "Identity",
    "IntSGD",
    "MinMax",
    "PayloadError",
    "PowerSGD",
    "RandomK",
    "RowTopK",
    "Rows",
    "Scaled",
    "SetupError",
    "Sign",
    "ThresholdTopK",
    "TopK",
    "UnsupportedError",
    "__version__",
    "codec_from_config",
]
