"""RandomK: values at random positions, which all ranks draw alike.

Source: Stich et al., Sparsified SGD with memory, NeurIPS 2018 (arXiv 1809.07599), random-k;
with a common seed its messages add up, as in GlobalRandK (Xu, arXiv 2109.12497).
Positions are drawn by strata, which makes them distinct and ascending without sorting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, combine
from hvd_qsgd.codecs.random_words import words
from hvd_qsgd.errors import ConfigError

KEY_BYTES = 8


@dataclass(frozen=True)
class RandomK(Codec):
    """Keep ``k = ceil(ratio * n)`` values of a tensor, one at random in each of k equal parts.

    Args:
        ratio: share of the values to keep, 0 < ratio <= 1.
        unbiased: multiply what is sent by the size of its part, so that the expectation is the
            input. Without it values are sent as they are and error feedback sends the rest later.

    Every element has the same chance to be sent, apart from parts that differ by one element.
    A tensor that holds NaN or an infinity decodes to NaN as a whole.

    Raises:
        ConfigError: a value is out of range.
    """

    ratio: float = 0.01
    unbiased: bool = False

    name: ClassVar[str] = "random_k"
    shared_randomness: ClassVar[bool] = True
    sum_dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ConfigError(f"RandomK: ratio={self.ratio!r} must be a number above 0 and at most 1.")

    @property
    def granularity(self) -> int:
        return 0

    @property
    def biased(self) -> bool:
        return not self.unbiased

    @property
    def omega(self) -> float:
        return float(-(-1 // self.ratio) - 1) if self.unbiased else 0.0

    def sum_length(self, length: int) -> int:
        """How many of ``length`` values are sent."""
        return min(length, int(np.ceil(np.float64(self.ratio) * length)))

    def payload_size(self, length: int) -> int:
        return KEY_BYTES + 4 * self.sum_length(length)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        """See :meth:`Kernels.encode_into`. Payload: the key, which tells the positions, and the values."""
        values = np.empty(self.sum_length(x.size), np.float32)
        self.to_sum(x, values, key)
        out[:KEY_BYTES] = np.frombuffer(int(key).to_bytes(KEY_BYTES, "little"), np.uint8)
        out[KEY_BYTES : KEY_BYTES + values.nbytes] = values.astype("<f4").view(np.uint8)
        return KEY_BYTES + values.nbytes

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.check_payload(payload, out.size)
        key = int.from_bytes(payload[:KEY_BYTES].tobytes(), "little")
        values = np.empty_like(out)
        self.from_sum(np.frombuffer(payload[KEY_BYTES:].tobytes(), "<f4"), values, 1, key)
        combine(out, values, mode)

    # -- SumCodec ----------------------------------------------------------------------------

    def to_sum(self, x: np.ndarray, out: np.ndarray, key: int, first: int = 0) -> None:
        """Write the values at the drawn positions, float32; all NaN unless all of ``x`` is finite."""
        if not self.all_finite(x):
            out[...] = np.nan
            return
        positions, sizes = self.positions(x.size, key)
        out[...] = x[positions]
        if self.unbiased:
            with np.errstate(over="ignore"):
                out *= sizes.astype(np.float32)

    def from_sum(self, sums: np.ndarray, out: np.ndarray, count: int, key: int, first: int = 0) -> None:
        """Spread the sum of the values of ``count`` ranks, divided by ``count``; zeros elsewhere."""
        positions, _ = self.positions(out.size, key)
        # A value that is not finite somewhere made all values NaN.
        out[...] = np.nan if len(sums) and np.isnan(sums[0]) else 0
        out[positions] = sums / np.float32(count)

    def positions(self, length: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Ascending positions, one in each part, and the sizes of the parts; int64.

        Part i of k is ``i * n // k`` to ``(i + 1) * n // k``; word i of the key, as a share of
        2^32, picks the position in it.
        """
        count = self.sum_length(length)
        edges = np.arange(count + 1, dtype=np.int64) * length // max(count, 1)
        sizes = np.diff(edges)
        drawn = words(key, 0, count).astype(np.uint64) * sizes.astype(np.uint64)
        return edges[:-1] + (drawn >> np.uint64(32)).astype(np.int64), sizes
