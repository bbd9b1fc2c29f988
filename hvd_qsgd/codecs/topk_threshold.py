"""ThresholdTopK: about the k largest values, found by a threshold that costs less than a selection.

Source: threshold reuse as in Li et al., Ok-topk, PPoPP 2022; sampling with refinement of Lin et
al., DGC (arXiv 1712.01887) and its code; statistical fits of SIDCo (:mod:`hvd_qsgd.codecs.sidco`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hvd_qsgd.codecs import sidco
from hvd_qsgd.codecs.base import Kernels, check_choice, check_integer
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

    Without memory (encoded by itself) "reuse" is exact. Runs on the CPU.

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

    def select(self, x: np.ndarray, memory: dict[str, Any], above: Any) -> np.ndarray:
        """Ascending positions of what to send of finite values, none of them zero.

        ``above(x, threshold)`` gives the positions of magnitudes of at least a threshold above 0.
        """
        wanted = self.kept(x.size)
        if wanted == x.size:
            return np.asarray(above(x, 0.0))
        if self.method == "reuse":
            return self._reuse(x, memory, above, wanted)
        if self.method == "sample":
            return self._sample(x, above, wanted)
        fit = self.method.removeprefix("sidco-")
        magnitudes = np.abs(x[x != 0])
        # The ratio counts all values, the fit knows those that are not zero.
        ratio = min(wanted / max(len(magnitudes), 1), 1.0)
        guess = sidco.threshold(magnitudes, ratio, fit, memory.get("stages", 1)) if ratio < 1 else 0.0
        guess = min(guess, LARGEST)
        positions = above(x, guess)
        sidco.adapt(memory, len(positions) / max(wanted, 1), self.ratio or 1.0)
        return self._at_most(x, positions, self.most(x.size))

    def _reuse(self, x: np.ndarray, memory: dict[str, Any], above: Any, wanted: int) -> np.ndarray:
        if memory.get("left", 0) > 0:
            positions = above(x, memory["threshold"])
            if wanted / 2 <= len(positions) <= MOST * wanted:
                memory["left"] -= 1
                return np.asarray(positions)
        magnitudes = x.view(np.uint32) & ABS_MASK
        positions = largest_positions(magnitudes, min(wanted, int(np.count_nonzero(magnitudes))))
        memory["threshold"] = float(np.abs(x[positions]).min()) if len(positions) else 0.0
        memory["left"] = self.every - 1
        return positions

    def _sample(self, x: np.ndarray, above: Any, wanted: int) -> np.ndarray:
        if wanted >= x.size:
            return np.asarray(above(x, 0.0))
        stride = max(int(min(1 / SAMPLE_RATIO, (self.ratio or 1.0) * x.size / 8)), 1)
        sample = np.abs(x[::stride])
        rank = min(max(round(wanted * len(sample) / max(x.size, 1)), 1), len(sample))
        guess = float(np.partition(sample, len(sample) - rank)[len(sample) - rank]) if rank else 0.0
        positions = above(x, guess)
        for _ in range(ATTEMPTS):
            if len(positions) >= LOWER * wanted:
                break
            guess *= 0.8
            positions = above(x, guess)
        return self._at_most(x, positions, wanted) if len(positions) > UPPER * wanted else np.asarray(positions)

    def _at_most(self, x: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
        """The ``count`` largest of some positions."""
        if len(positions) <= count:
            return np.asarray(positions)
        return np.asarray(positions)[largest_positions(x[positions].view(np.uint32) & ABS_MASK, count)]


def above(x: np.ndarray, threshold: float) -> np.ndarray:
    """Positions of magnitudes of at least ``threshold``, and above zero."""
    return np.flatnonzero((np.abs(x) >= np.float32(threshold)) & (x != 0))


@dataclass(frozen=True)
class Remembering(Kernels):
    """A ThresholdTopK with the memory of one tensor."""

    codec: ThresholdTopK
    memory: dict[str, Any]

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        if x.size and (x.view(np.uint32) & ABS_MASK).max() >= INFINITY_BITS:
            return self.codec.write_not_finite(out)
        return self.codec.write(x, self.codec.select(x, self.memory, above), out)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        self.codec.decode_into(payload, out, mode)
