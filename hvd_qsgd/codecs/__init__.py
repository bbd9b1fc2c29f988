"""Codecs: what is sent. One file per codec; ``registry.py`` is the only list of them."""

from __future__ import annotations

from typing import Any

from hvd_qsgd.codecs import registry
from hvd_qsgd.codecs.base import Codec as Codec
from hvd_qsgd.codecs.base import Kernels as Kernels
from hvd_qsgd.codecs.registry import *  # noqa: F403
from hvd_qsgd.errors import ConfigError

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in vars(registry).values() if isinstance(codec, type) and issubclass(codec, Codec)
}


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
