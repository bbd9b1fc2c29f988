"""Scaled: an unbiased codec, shrunk until error feedback around it converges.

Source: a codec with E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2 becomes a contraction by
the factor 1 / (1 + omega); Richtarik et al., EF21 (arXiv 2106.05203), Lemma 8, and their code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, combine
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.errors import ConfigError


@dataclass(frozen=True)
class Scaled(Codec):
    """Sends what ``inner`` sends and decodes it times ``1 / (1 + omega)``.

    Where a mean is encoded once more (scatter_gather), it is shrunk once more: the two
    together are a contraction still, by the square of the factor.

    Args:
        inner: an unbiased codec, or its configuration.

    Raises:
        ConfigError: the codec needs no scaling.
    """

    inner: Any

    name: ClassVar[str] = "scaled"

    def __post_init__(self) -> None:
        if isinstance(self.inner, dict):
            from hvd_qsgd.codecs import codec_from_config

            object.__setattr__(self, "inner", codec_from_config(self.inner))
        if not isinstance(self.inner, Codec) or self.inner.omega == 0:
            raise ConfigError(
                f"Scaled: {self.inner!r} is not a codec whose error can exceed its input; error feedback around it "
                f"needs no scaling."
            )

    @property
    def factor(self) -> np.float32:
        """1 / (1 + omega), by which the inner codec's values are multiplied."""
        return np.float32(1 / (1 + self.inner.omega))

    @property
    def encodes_means(self) -> bool:  # type: ignore[override]
        return bool(self.inner.encodes_means)

    @property
    def variable_size(self) -> bool:  # type: ignore[override]
        return bool(self.inner.variable_size)

    @property
    def shared_randomness(self) -> bool:  # type: ignore[override]
        return bool(self.inner.shared_randomness)

    @property
    def granularity(self) -> int:
        return int(self.inner.granularity)

    @property
    def biased(self) -> bool:
        return True

    def config(self) -> dict[str, Any]:
        return {"codec": self.name, "inner": self.inner.config()}

    def payload_size(self, length: int) -> int:
        return int(self.inner.payload_size(length))

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        return int(self.inner.encode_into(x, out, key, first))

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        return functools.partial(self._combine, (yield from self.inner.prepare_decode(payload, length)))

    def _combine(self, decode: Callable[[np.ndarray, str], None], out: np.ndarray, mode: str) -> None:
        values = np.empty_like(out)
        decode(values, "set")
        combine(out, values * self.factor, mode)

    # -- LaneCodec and SumCodec, if the inner codec is one: its words, and the mean times the factor --

    def __getattr__(self, name: str) -> Any:
        # Sizes and dtypes of words that can be added up, where the inner codec has such words.
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def from_lanes(self, sums: np.ndarray, agreed: np.ndarray, ranks: int, out: np.ndarray, count: int) -> None:
        """See :meth:`QSGD.from_lanes`; times the factor."""
        self.inner.from_lanes(sums, agreed, ranks, out, count)
        out *= self.factor

    def from_sum(self, sums: np.ndarray, out: np.ndarray, count: int, key: int, first: int = 0) -> None:
        """See :meth:`RandomK.from_sum`; times the factor."""
        self.inner.from_sum(sums, out, count, key, first)
        out *= self.factor
