"""ThresholdTopK in torch operations. The bytes are specified by :mod:`hvd_qsgd.codecs.topk_threshold`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs.topk_threshold import Search, ThresholdTopK
from hvd_qsgd.kernels.torch.topk import TopKKernels, largest_positions, magnitudes_of


class TorchSearch(Search):
    """The same on any torch device."""

    @staticmethod
    def above(x: torch.Tensor, threshold: float) -> torch.Tensor:
        # Patterns of bits, because devices may take subnormal numbers for zero.
        lowest = max(int(np.float32(threshold).view(np.int32)), 1)
        return (magnitudes_of(x) >= lowest).nonzero().view(-1)

    @staticmethod
    def largest(x: torch.Tensor, count: int) -> torch.Tensor:
        magnitudes = magnitudes_of(x)
        return largest_positions(magnitudes, min(count, int(magnitudes.count_nonzero())))

    @staticmethod
    def ranked(magnitudes: torch.Tensor, rank: int) -> float:
        return float(magnitudes.topk(rank, sorted=False).values.min())

    @staticmethod
    def moments(magnitudes: torch.Tensor) -> tuple[float, float, float]:
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

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        if not self.all_finite(x):
            return self.write_not_finite(out)
        memory = {} if self.memory is None else self.memory
        return self.write(x, self.codec.select(x, memory, TorchSearch), out)
