"""Cast: half precision, rounded to nearest even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_choice, combine

#: The quiet NaN of each format.
NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0}


@dataclass(frozen=True)
class Cast(Codec):
    """Sends every value as float16 or bfloat16.

    Args:
        dtype: "float16" (values above 65504 become infinite, as with ``hvd.Compression.fp16``)
            or "bfloat16" (the range of float32 with 8 significant bits).

    Raises:
        ConfigError: another dtype.
    """

    dtype: str = "float16"

    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        check_choice("Cast", "dtype", self.dtype, ("float16", "bfloat16"))

    def payload_size(self, length: int) -> int:
        return 2 * length

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        with np.errstate(over="ignore"):
            halves = x.astype(np.float16).view(np.uint16) if self.dtype == "float16" else to_bfloat16(x)
        # One bit pattern for every NaN, so that all backends write the same bytes.
        halves = np.where(np.isnan(x), NAN_BITS[self.dtype], halves).astype("<u2")
        out[: 2 * x.size] = halves.view(np.uint8)
        return 2 * x.size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        halves = np.frombuffer(payload.tobytes(), "<u2")
        if self.dtype == "float16":
            combine(out, halves.astype(np.uint16).view(np.float16).astype(np.float32), mode)
        else:
            combine(out, (halves.astype(np.uint32) << np.uint32(16)).view(np.float32), mode)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bfloat16 (ties to even), uint16; undefined for NaN."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
