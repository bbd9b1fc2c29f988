"""Identity: the do-nothing member, so that plain averaging runs through the same path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, combine


@dataclass(frozen=True)
class Identity(Codec):
    """Sends every value as little-endian float32."""

    name: ClassVar[str] = "identity"

    def payload_size(self, length: int) -> int:
        return 4 * length

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        out[: 4 * x.size] = x.astype("<f4").view(np.uint8)
        return 4 * x.size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        combine(out, np.frombuffer(payload.tobytes(), "<f4"), mode)
