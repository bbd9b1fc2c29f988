"""Codecs: what is sent. One file per codec; the registry below is the only list of them."""

from __future__ import annotations

from typing import Any

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.codecs.cast import Cast
from hvd_qsgd.codecs.elias import EliasQSGD
from hvd_qsgd.codecs.identity import Identity
from hvd_qsgd.codecs.intsgd import IntSGD
from hvd_qsgd.codecs.minmax import MinMax
from hvd_qsgd.codecs.powersgd import PowerSGD
from hvd_qsgd.codecs.qsgd import QSGD
from hvd_qsgd.codecs.random_k import RandomK
from hvd_qsgd.codecs.rows import Rows
from hvd_qsgd.codecs.scaled import Scaled
from hvd_qsgd.codecs.sign import Sign
from hvd_qsgd.codecs.topk import TopK
from hvd_qsgd.codecs.topk_global import GlobalTopK
from hvd_qsgd.codecs.topk_rows import RowTopK
from hvd_qsgd.codecs.topk_threshold import ThresholdTopK
from hvd_qsgd.errors import ConfigError

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        QSGD,
        TopK,
        MinMax,
        Rows,
        Identity,
        Cast,
        Scaled,
        RandomK,
        Sign,
        EliasQSGD,
        RowTopK,
        GlobalTopK,
        ThresholdTopK,
        PowerSGD,
        IntSGD,
    )
}

__all__ = [
    "CODECS",
    "QSGD",
    "Cast",
    "Codec",
    "EliasQSGD",
    "GlobalTopK",
    "Identity",
    "IntSGD",
    "Kernels",
    "MinMax",
    "PowerSGD",
    "RandomK",
    "RowTopK",
    "Rows",
    "Scaled",
    "Sign",
    "ThresholdTopK",
    "TopK",
    "codec_from_config",
]


def codec_from_config(config: dict[str, Any]) -> Codec:
    """Rebuild a codec from :meth:`Codec.config`.

    Raises:
        ConfigError: an unknown codec or field, or a value out of range.

    Examples:
        >>> QSGD(bits=8).config()
        {'codec': 'qsgd', 'bits': 8, 'bucket_size': 512, 'norm': 'max', 'rounding': 'stochastic'}
        >>> codec_from_config(QSGD(bits=8).config()) == QSGD(bits=8)
        True
    """
    fields = dict(config)
    name = fields.pop("codec", None)
    if not isinstance(name, str) or name not in CODECS:
        raise ConfigError(f"Unknown codec {name!r}; known are {', '.join(sorted(CODECS))}.")
    if isinstance(fields.get("inner"), dict):
        fields["inner"] = codec_from_config(fields["inner"])
    try:
        return CODECS[name](**fields)
    except TypeError as error:
        raise ConfigError(f"Configuration {config} does not fit the codec {name!r}: {error}.") from error
