"""Codecs whose messages mean something as a sum over ranks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.errors import UnsupportedError


@dataclass(frozen=True)
class ExchangedCodec(Codec):
    """A configuration for the exchange that does all the work, on arrays of any backend."""

    encodes: ClassVar[bool] = False

    @property
    def granularity(self) -> int:
        return 0

    def payload_size(self, length: int) -> int:
        raise self._alone()

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        raise self._alone()

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        raise self._alone()

    def _alone(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self} cannot encode a tensor by itself: what it sends is added up over ranks. Use it as the codec of a "
            f"compressor."
        )


@dataclass(frozen=True)
class ExchangedKernels(Kernels):
    """The same on any backend: there are no kernels."""

    codec: ExchangedCodec

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        return self.codec.encode_into(x, out, key, first)

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        self.codec.decode_into(payload, out, mode)
