"""ThresholdTopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_threshold`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.codecs.topk_threshold import Search, ThresholdTopK
from hvd_qsgd.kernels.torch.topk import TopKKernels, largest_positions, magnitudes_of, marked_positions


class TorchSearch(Search):
    """The same on any torch device."""

    @staticmethod
    def above(x: torch.Tensor, threshold: float) -> Looks[torch.Tensor]:
        # Patterns of bits, because devices may take subnormal numbers for zero.
        lowest = max(int(np.float32(threshold).view(np.int32)), 1)
        reached = magnitudes_of(x) >= lowest
        (seen,) = yield [reached.sum().view(1)]
        return marked_positions(reached, int(seen[0]))

    @staticmethod
    def largest(x: torch.Tensor, count: int) -> Looks[torch.Tensor]:
        magnitudes = magnitudes_of(x)
        (seen,) = yield [magnitudes.count_nonzero().view(1)]
        return largest_positions(magnitudes, min(count, int(seen[0])))

    @staticmethod
    def ranked(magnitudes: torch.Tensor, rank: int) -> Looks[float]:
        (seen,) = yield [magnitudes.topk(rank, sorted=False).values.min().view(1)]
        return float(seen[0])

    @staticmethod
    def moments(magnitudes: torch.Tensor) -> tuple[float, float, float]:
        # The fits take as many looks as stages, and wait for each.
        values = magnitudes.double()
        return float(values.mean()), float(values.var(correction=0)), float(values[values > 0].log().mean())


@dataclass(frozen=True)
class ThresholdKernels(TopKKernels):
    """torch implementation of a ThresholdTopK codec; see :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: ThresholdTopK
    #: Of one tensor; None is no memory at all.
    memory: dict[str, Any] | None = None

    def with_memory(self, memory: dict[str, Any]) -> ThresholdKernels:
        return ThresholdKernels(self.codec, memory)

    def choose(self, x: torch.Tensor) -> Looks[torch.Tensor | None]:
        (finite,) = yield [(x.abs() < float("inf")).all().view(1)]
        if not finite[0]:
            return None
        return (yield from self.codec.select(x, {} if self.memory is None else self.memory, TorchSearch))
