"""Where feedback keeps its arrays: in float32, or smaller, as payloads of codecs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_choice
from hvd_qsgd.codecs.cast import Cast
from hvd_qsgd.codecs.qsgd import QSGD
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.kernels import kernels_of

#: How an array can be kept. Both codecs decode to values that they encode to the same bytes
#: again, so a checkpoint in float32 restores the very payload.
KEPT_AS: dict[str, Codec | None] = {
    "float32": None,
    "bfloat16": Cast("bfloat16"),
    "int8": QSGD(bits=8, bucket_size=512, rounding="nearest"),
}


def check_kept_as(kind: str, field: str, value: str) -> None:
    check_choice(kind, field, value, tuple(KEPT_AS))


class Store:
    """Flat float32 arrays by tensor name."""

    def __init__(self, kept_as: str = "float32") -> None:
        self._codec = KEPT_AS[kept_as]
        self._kept: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}

    def names(self) -> Iterable[str]:
        return self._kept.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> Any:
        """The array; not to be written to."""
        kept = self._kept[name]
        if self._codec is None:
            return kept
        length = self._lengths[name]
        out = _empty(kept, length, "float32")
        self._kernels(kept).decode_into(kept, out)
        return out

    def get_for(self, name: str, x: Any) -> Any | None:
        """The array that goes with a gradient ``x``, or None if there is none yet.

        Raises:
            ConfigError: it has another length.
        """
        if name not in self._kept:
            return None
        if self._lengths[name] != len(x):
            raise ConfigError(
                f"Error feedback holds a residual of {self._lengths[name]} elements for {name!r}, but a gradient of "
                f"{len(x)} elements came. If the model changed, forget the old residuals with compressor.reset()."
            )
        return self.get(name)

    def put(self, name: str, array: Any) -> Any | None:
        """Keep an array, which must not be written to any more; returns one whose memory is free now, or None."""
        before = self._kept.get(name)
        self._lengths[name] = len(array)
        if self._codec is None:
            self._kept[name] = array
            return before
        if before is None or len(before) != self._codec.payload_size(len(array)):
            before = _empty(array, self._codec.payload_size(len(array)), "uint8")
        self._kernels(array).encode_into(array, before)
        self._kept[name] = before
        return None

    def _kernels(self, array: Any) -> Any:
        assert self._codec is not None
        return kernels_of(self._codec, array)


def _empty(like: Any, length: int, dtype: str) -> Any:
    """An array of the kind and on the device of another one."""
    if isinstance(like, np.ndarray):
        return np.empty(length, dtype)
    if hasattr(like, "backend"):
        return like.empty(length, dtype)
    import torch

    return like.new_empty(length, dtype=getattr(torch, dtype))
