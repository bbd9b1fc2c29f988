"""A compressor for each codec, for torch; ``hvd_qsgd.compressors.catalogue`` says what their settings mean."""

from hvd_qsgd.compressors import catalogue as _family
from hvd_qsgd.torch.compressor import Compressor as Compressor


class CastCompressor(_family.CastCompressor, Compressor): ...


class EliasQSGDCompressor(_family.EliasQSGDCompressor, Compressor): ...


class GlobalTopKCompressor(_family.GlobalTopKCompressor, Compressor): ...


class IdentityCompressor(_family.IdentityCompressor, Compressor): ...


class IntSGDCompressor(_family.IntSGDCompressor, Compressor): ...


class PowerSGDCompressor(_family.PowerSGDCompressor, Compressor): ...


class QSGDCompressor(_family.QSGDCompressor, Compressor): ...


class RandomKCompressor(_family.RandomKCompressor, Compressor): ...


class RowTopKCompressor(_family.RowTopKCompressor, Compressor): ...


class SignCompressor(_family.SignCompressor, Compressor): ...


class ThresholdTopKCompressor(_family.ThresholdTopKCompressor, Compressor): ...


class TopKCompressor(_family.TopKCompressor, Compressor): ...
