"""ThresholdTopK: about the k largest values, found by a threshold that costs less than a selection.

Source: threshold reuse as in Li et al., Ok-topk, PPoPP 2022; sampling with refinement of Lin et
al., DGC (arXiv 1712.01887) and its code; statistical fits of SIDCo (:mod:`hvd_qsgd.codecs.sidco`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hvd_qsgd.codecs import sidco
from hvd_qsgd.codecs.base import Kernels, check_choice, check_integer
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.codecs.topk import ABS_MASK, INFINITY_BITS, TopK, largest_positions
from hvd_qsgd.errors import ConfigError

METHODS = ("reuse", "sample", *(f"sidco-{fit}" for fit in sidco.FITS))
LARGEST = float(np.finfo(np.float32).max)
#: No payload holds more than this many times k values.
MOST = 2
#: Of DGC: share of the values that is sampled, bounds of found / k, and how often the threshold is lowered.
SAMPLE_RATIO, UPPER, LOWER, ATTEMPTS = 0.01, 1.3, 0.8, 10


@dataclass(frozen=True)
class ThresholdTopK(TopK):
    """Send the values above a threshold, in TopK's format. Their number varies, up to 2 k.

    Args:
        ratio, values: see :class:`hvd_qsgd.TopK`.
        method: "reuse": the exact threshold of an earlier step, renewed after ``every`` steps or when
            it finds less than half or more than twice the wanted number. "sample": the threshold of a
            sample, refined as in DGC. "sidco-exponential", "sidco-pareto", "sidco-gamma": SIDCo's fits.
        every: steps that a threshold is used for.

    Without memory (encoded by itself) "reuse" is exact. Backends send the same bytes given the same threshold; SIDCo's
    follow from sums in float64, whose last bits differ between backends.

    Raises:
        ConfigError: a value is out of range.
    """

    method: str = "reuse"
    every: int = 20

    name: ClassVar[str] = "topk_threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None:
            raise ConfigError("ThresholdTopK: the number of values follows from ratio; k must be None.")
        check_choice("ThresholdTopK", "method", self.method, METHODS)
        object.__setattr__(self, "every", check_integer("ThresholdTopK", "every", self.every, 1, 2**31))

    def most(self, length: int) -> int:
        """How many of ``length`` values are sent at most."""
        return min(MOST * self.kept(length), length)

    def payload_size(self, length: int) -> int:
        return TopK(k=max(self.most(length), 1), values=self.values).payload_size(length)

    def with_memory(self, memory: dict[str, Any]) -> Kernels:
        return Remembering(self, memory)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        return Remembering(self, {}).encode_into(x, out, key, first)

    def select(self, x: Any, memory: dict[str, Any], search: type[Search]) -> Looks[Any]:
        """Ascending positions of what to send of finite values, none of them zero; arrays are those of ``search``."""
        wanted = self.kept(len(x))
        if wanted == len(x):
            return (yield from search.above(x, 0.0))
        if self.method == "reuse":
            return (yield from self._reuse(x, memory, search, wanted))
        if self.method == "sample":
            return (yield from self._sample(x, search, wanted))
        magnitudes = abs(x[x != 0])
        # The ratio counts all values, the fit knows those that are not zero.
        ratio = min(wanted / max(len(magnitudes), 1), 1.0)
        guess = 0.0
        if ratio < 1:
            fit = self.method.removeprefix("sidco-")
            guess = min(sidco.threshold(magnitudes, ratio, fit, memory.get("stages", 1), search.moments), LARGEST)
        positions = yield from search.above(x, guess)
        sidco.adapt(memory, len(positions) / max(wanted, 1), self.ratio or 1.0)
        return (yield from self._at_most(x, positions, search, self.most(len(x))))

    def _reuse(self, x: Any, memory: dict[str, Any], search: type[Search], wanted: int) -> Looks[Any]:
        if memory.get("left", 0) > 0:
            positions = yield from search.above(x, memory["threshold"])
            if wanted / 2 <= len(positions) <= MOST * wanted:
                memory["left"] -= 1
                return positions
        positions = yield from search.largest(x, wanted)
        kept = len(positions)
        memory["threshold"] = (yield from search.ranked(abs(x[positions]), kept)) if kept else 0.0
        memory["left"] = self.every - 1
        return positions

    def _sample(self, x: Any, search: type[Search], wanted: int) -> Looks[Any]:
        stride = max(int(min(1 / SAMPLE_RATIO, (self.ratio or 1.0) * len(x) / 8)), 1)
        sample = abs(x[::stride])
        guess = yield from search.ranked(sample, min(max(round(wanted * len(sample) / len(x)), 1), len(sample)))
        positions = yield from search.above(x, guess)
        for _ in range(ATTEMPTS):
            if len(positions) >= LOWER * wanted:
                break
            guess *= 0.8
            positions = yield from search.above(x, guess)
        return (
            (yield from self._at_most(x, positions, search, wanted)) if len(positions) > UPPER * wanted else positions
        )

    def _at_most(self, x: Any, positions: Any, search: type[Search], count: int) -> Looks[Any]:
        """The ``count`` largest of some positions."""
        return positions if len(positions) <= count else positions[(yield from search.largest(x[positions], count))]


class Search:
    """What a selection by threshold asks of a backend; here of NumPy, which never looks."""

    @staticmethod
    def above(x: Any, threshold: float) -> Looks[Any]:
        """Ascending positions of magnitudes of at least ``threshold`` rounded to float32, and above zero."""
        yield from ()
        return np.flatnonzero((np.abs(x) >= np.float32(threshold)) & (x != 0))

    @staticmethod
    def largest(x: Any, count: int) -> Looks[Any]:
        """Ascending positions of the ``count`` largest magnitudes, of equal ones the first; never of zeros."""
        yield from ()
        magnitudes = x.view(np.uint32) & ABS_MASK
        return largest_positions(magnitudes, min(count, int(np.count_nonzero(magnitudes))))

    @staticmethod
    def ranked(magnitudes: Any, rank: int) -> Looks[float]:
        """The ``rank``-th largest, from 1."""
        yield from ()
        return float(np.partition(magnitudes, len(magnitudes) - rank)[len(magnitudes) - rank])

    @staticmethod
    def moments(magnitudes: Any) -> tuple[float, float, float]:
        """See :data:`hvd_qsgd.codecs.sidco.Moments`."""
        return sidco.moments(magnitudes)


@dataclass(frozen=True)
class Remembering(Kernels):
    """A ThresholdTopK with the memory of one tensor."""

    codec: ThresholdTopK
    memory: dict[str, Any]

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        if x.size and (x.view(np.uint32) & ABS_MASK).max() >= INFINITY_BITS:
            return self.codec.write_not_finite(out)
        return self.codec.write(x, at_once(self.codec.select(x, self.memory, Search)), out)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.codec.decode_into(payload, out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        return self.codec.prepare_decode(payload, length)
