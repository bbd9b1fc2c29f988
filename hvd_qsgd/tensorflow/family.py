"""A compressor for each codec, for TensorFlow. Those that TensorFlow cannot exchange are left out."""

from __future__ import annotations

from typing_extensions import Unpack

from hvd_qsgd.codecs import (
    QSGD,
    Cast,
    EliasQSGD,
    GlobalTopK,
    Identity,
    RandomK,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.tensorflow.compressor import Compressor, TensorFlowSettings

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


class CastCompressor(Compressor):
    """Sends float16 or bfloat16 and adds up in float32.

    Args:
        dtype: see :class:`hvd_qsgd.Cast`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(self, dtype: str = "float16", **settings: Unpack[TensorFlowSettings]) -> None:
        super().__init__(Cast(dtype), **settings)


class EliasQSGDCompressor(Compressor):
    """QSGD with L2 norm and entropy coding, as in the paper.

    Args:
        bits, bucket_size, norm, rounding: see :class:`hvd_qsgd.EliasQSGD`.
        scaled: shrink it for error feedback; see :class:`hvd_qsgd.Scaled`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 512,
        norm: str = "l2",
        rounding: str = "stochastic",
        scaled: bool = False,
        **settings: Unpack[TensorFlowSettings],
    ) -> None:
        codec = EliasQSGD(bits, bucket_size, norm, rounding)
        super().__init__(Scaled(codec) if scaled else codec, **settings)


class GlobalTopKCompressor(Compressor):
    """The largest values of all tensors of a fusion buffer, with error feedback.

    Args:
        ratio, k, values: see :class:`hvd_qsgd.GlobalTopK`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(
        self,
        ratio: float | None = 0.01,
        k: int | None = None,
        values: str = "float32",
        **settings: Unpack[TensorFlowSettings],
    ) -> None:
        super().__init__(GlobalTopK(ratio, k, values), **settings)


class IdentityCompressor(Compressor):
    """Sends float32 through the same path as the others, for comparison."""

    def __init__(self, **settings: Unpack[TensorFlowSettings]) -> None:
        super().__init__(Identity(), **settings)


class QSGDCompressor(Compressor):
    """Quantization with unbiased rounding, 8 times fewer bytes at the default 4 bits.

    Args:
        bits, bucket_size, norm, rounding: see :class:`hvd_qsgd.QSGD`.
        scaled: shrink stochastic rounding with L2 norm for error feedback; see :class:`hvd_qsgd.Scaled`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 512,
        norm: str = "max",
        rounding: str = "stochastic",
        scaled: bool = False,
        **settings: Unpack[TensorFlowSettings],
    ) -> None:
        codec = QSGD(bits, bucket_size, norm, rounding)
        super().__init__(Scaled(codec) if scaled else codec, **settings)


class RandomKCompressor(Compressor):
    """Random values at positions that all ranks draw alike, added up in one allreduce; with error feedback.

    Args:
        ratio, unbiased: see :class:`hvd_qsgd.RandomK`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(self, ratio: float = 0.01, unbiased: bool = False, **settings: Unpack[TensorFlowSettings]) -> None:
        super().__init__(RandomK(ratio, unbiased), **settings)


class RowTopKCompressor(Compressor):
    """The largest values of every row of consecutive values, with error feedback.

    Args:
        ratio, row: see :class:`hvd_qsgd.RowTopK`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(self, ratio: float = 0.01, row: int = 1024, **settings: Unpack[TensorFlowSettings]) -> None:
        super().__init__(RowTopK(ratio, row), **settings)


class SignCompressor(Compressor):
    """One bit a value with error feedback: EF-SignSGD.

    Args:
        bucket_size: see :class:`hvd_qsgd.Sign`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(self, bucket_size: int = 512, **settings: Unpack[TensorFlowSettings]) -> None:
        super().__init__(Sign(bucket_size), **settings)


class ThresholdTopKCompressor(Compressor):
    """About the largest values, by a threshold that is used again, sampled or estimated; with error feedback.

    Args:
        ratio, values, method, every: see :class:`hvd_qsgd.ThresholdTopK`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(
        self,
        ratio: float = 0.01,
        values: str = "float32",
        method: str = "reuse",
        every: int = 20,
        **settings: Unpack[TensorFlowSettings],
    ) -> None:
        super().__init__(ThresholdTopK(ratio, None, values, method, every), **settings)


class TopKCompressor(Compressor):
    """The largest values only, with error feedback.

    Args:
        ratio, k, values: see :class:`hvd_qsgd.TopK`.
        settings: see :class:`hvd_qsgd.tensorflow.Compressor`.
    """

    def __init__(
        self,
        ratio: float | None = 0.01,
        k: int | None = None,
        values: str = "float32",
        **settings: Unpack[TensorFlowSettings],
    ) -> None:
        super().__init__(TopK(ratio, k, values), **settings)
