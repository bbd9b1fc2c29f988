"""Gradient compression for stock Horovod.

    from hvd_qsgd.torch import QSGDCompressor
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=QSGDCompressor)

Importing this package imports NumPy at most; frameworks and Horovod are imported by the
subpackages that need them, when they need them.
"""

from hvd_qsgd.codecs import Codec as Codec
from hvd_qsgd.codecs import codec_from_config as codec_from_config
from hvd_qsgd.codecs.registry import *  # noqa: F403
from hvd_qsgd.errors import ConfigError as ConfigError
from hvd_qsgd.errors import ExchangeError as ExchangeError
from hvd_qsgd.errors import HvdQsgdError as HvdQsgdError
from hvd_qsgd.errors import PayloadError as PayloadError
from hvd_qsgd.errors import SetupError as SetupError
from hvd_qsgd.errors import UnsupportedError as UnsupportedError

__version__ = "0.1.0"
