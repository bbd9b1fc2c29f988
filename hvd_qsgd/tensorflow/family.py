"""Compressors around the further codecs that TensorFlow can exchange."""

from __future__ import annotations

from hvd_qsgd.family import (
    EliasQSGDBase,
    GlobalTopKBase,
    RandomKBase,
    RowTopKBase,
    SignBase,
    ThresholdTopKBase,
)
from hvd_qsgd.tensorflow.compressor import Compressor


class SignCompressor(SignBase, Compressor):
    __doc__ = SignBase.__doc__


class RandomKCompressor(RandomKBase, Compressor):
    __doc__ = RandomKBase.__doc__


class EliasQSGDCompressor(EliasQSGDBase, Compressor):
    __doc__ = EliasQSGDBase.__doc__


class RowTopKCompressor(RowTopKBase, Compressor):
    __doc__ = RowTopKBase.__doc__


class GlobalTopKCompressor(GlobalTopKBase, Compressor):
    __doc__ = GlobalTopKBase.__doc__


class ThresholdTopKCompressor(ThresholdTopKBase, Compressor):
    __doc__ = ThresholdTopKBase.__doc__
