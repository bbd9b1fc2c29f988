"""A compressor for each codec, for TensorFlow; ``hvd_qsgd.compressors.catalogue`` says what their settings mean.

Those that TensorFlow cannot exchange are left out.
"""

from hvd_qsgd.compressors import catalogue as _family
from hvd_qsgd.tensorflow.compressor import Compressor as Compressor


class CastCompressor(_family.CastCompressor, Compressor): ...


class EliasQSGDCompressor(_family.EliasQSGDCompressor, Compressor): ...


class GlobalTopKCompressor(_family.GlobalTopKCompressor, Compressor): ...


class IdentityCompressor(_family.IdentityCompressor, Compressor): ...


class QSGDCompressor(_family.QSGDCompressor, Compressor): ...


class RandomKCompressor(_family.RandomKCompressor, Compressor): ...


class RowTopKCompressor(_family.RowTopKCompressor, Compressor): ...


class SignCompressor(_family.SignCompressor, Compressor): ...


class ThresholdTopKCompressor(_family.ThresholdTopKCompressor, Compressor): ...


class TopKCompressor(_family.TopKCompressor, Compressor): ...
