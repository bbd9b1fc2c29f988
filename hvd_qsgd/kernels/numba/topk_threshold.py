"""ThresholdTopK on the CPU. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_threshold`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.codecs.topk_threshold import Search, ThresholdTopK
from hvd_qsgd.kernels.numba.topk import TopKKernels, gather


class NumbaSearch(Search):
    """One pass finds what is above a threshold."""

    @staticmethod
    def above(x: np.ndarray, threshold: float) -> Looks[np.ndarray]:
        """With a guess at the number that is seldom too small."""
        yield from ()
        lowest = np.int32(max(int(np.float32(threshold).view(np.int32)), 1))
        patterns = x.view(np.int32)
        positions = np.empty(min(len(x) // 16 + 1024, len(x)), np.int64)
        found = gather(patterns, lowest, positions)
        if found > len(positions):
            positions = np.empty(found, np.int64)
            gather(patterns, lowest, positions)
        return positions[:found]


@dataclass(frozen=True)
class ThresholdKernels(TopKKernels):
    """Numba implementation of a ThresholdTopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: ThresholdTopK
    #: Of one tensor; None is no memory at all.
    memory: dict[str, Any] | None = None

    def with_memory(self, memory: dict[str, Any]) -> ThresholdKernels:
        return ThresholdKernels(self.codec, memory)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        if not self.all_finite(x):
            return self.codec.write_not_finite(out)
        memory = {} if self.memory is None else self.memory
        return self.write(x, at_once(self.codec.select(x, memory, NumbaSearch)), out)
