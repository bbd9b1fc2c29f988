"""Codecs: what is sent. One file per codec; ``registry.py`` is the only list of those of this package.

Others come from packages with entry points in the group ``hvd_qsgd.codecs``, or from :func:`register`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from hvd_qsgd.codecs import registry
from hvd_qsgd.codecs.base import Codec as Codec
from hvd_qsgd.codecs.base import Kernels as Kernels
from hvd_qsgd.codecs.registry import *  # noqa: F403
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.plugins import Registry, class_fault, name_fault

AnyCodec = TypeVar("AnyCodec", bound="type[Codec]")


def _fault(name: Any, codec: Any) -> str:
    return class_fault(Codec, codec) or name_fault(name, codec)


CODECS: Registry[type[Codec]] = Registry(
    "hvd_qsgd.codecs",
    "codec",
    _fault,
    {codec.name: codec for codec in vars(registry).values() if isinstance(codec, type) and issubclass(codec, Codec)},
)


def register(codec: AnyCodec) -> AnyCodec:
    """Make a codec of yours known by its ``name``, in configurations and rules; also a decorator of the class.

    Raises:
        ConfigError: the name belongs to another codec, or it does not derive from :class:`Codec`.
    """
    CODECS.register(getattr(codec, "name", ""), codec)
    return codec


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
