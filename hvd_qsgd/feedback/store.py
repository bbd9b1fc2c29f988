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
    """Flat float32 arrays by tensor name.

    The array before the last one is kept as well, until :meth:`settle` says which of the two holds.
    """

    def __init__(self, kept_as: str = "float32") -> None:
        self._codec = KEPT_AS[kept_as]
        self._kept: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        #: What :meth:`put` has replaced; None where there was nothing.
        self._before: dict[str, Any] = {}
        #: Memory that is free to be written to.
        self._spare: dict[str, Any] = {}

    def names(self) -> Iterable[str]:
        return self._kept.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> Any:
        """The array; not to be written to."""
        return self._decoded(name, self._kept[name])

    def get_before(self, name: str) -> Any | None:
        """The array as :meth:`settle` would restore it; None if there was none."""
        kept = self._before.get(name, self._kept[name])
        return None if kept is None else self._decoded(name, kept)

    def _decoded(self, name: str, kept: Any) -> Any:
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

    def put(self, name: str, array: Any) -> None:
        """Keep an array, which must not be written to any more."""
        self.settle(name)
        self._before[name] = self._kept.get(name)
        self._lengths[name] = len(array)
        if self._codec is None:
            self._kept[name] = array
            return
        payload = self._spare.pop(name, None)
        if payload is None or len(payload) != self._codec.payload_size(len(array)):
            payload = _empty(array, self._codec.payload_size(len(array)), "uint8")
        self._kernels(array).encode_into(array, payload)
        self._kept[name] = payload

    def settle(self, name: str, applied: bool = True) -> bool:
        """Let the array of the last :meth:`put` hold, or the one before it; returns whether there was a choice.

        Whoever puts another one has accepted the last.
        """
        if name not in self._before:
            return False
        before = self._before.pop(name)
        free = before
        if not applied:
            free = self._kept.pop(name)
            if before is not None:
                self._kept[name] = before
        if free is not None:
            self._spare[name] = free
        return True

    def room(self, name: str, x: Any) -> Any:
        """An array like ``x`` to be written to: memory that is free now, or new."""
        self.settle(name)
        spare = self._spare.pop(name, None) if self._codec is None else None
        return _empty(x, len(x), "float32") if spare is None or len(spare) != len(x) else spare

    def forget(self, name: str) -> None:
        """Free what is kept of a tensor."""
        for kept in (self._kept, self._lengths, self._before, self._spare):
            kept.pop(name, None)

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
