"""TopK on a GPU: the largest are found by counting digits, and nothing is sorted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvd_qsgd.kernels.torch.topk import TopKKernels as TorchKernels
from hvd_qsgd.kernels.triton.launch import blocks, launch
from hvd_qsgd.kernels.triton.select import count_chosen, count_digits, write_chosen

#: Place and size in bits of the digits of a magnitude's 31 bits, the highest first.
DIGITS = ((20, 11), (10, 10), (0, 10))
BLOCK = 2048
#: Of the counts of digits. Most magnitudes share a few of them.
COPIES = 64


@dataclass(frozen=True)
class TopKKernels(TorchKernels):
    """Triton implementation of a TopK codec: selection here, positions and values by torch operations."""

    def largest_positions(self, magnitudes: torch.Tensor, count: int) -> torch.Tensor:
        """:func:`hvd_qsgd.codecs.topk.largest_positions`; waits for nothing."""
        if count == 0:
            return super().largest_positions(magnitudes, count)
        length, device = len(magnitudes), magnitudes.device
        grid = (blocks(length, BLOCK),)
        threshold = torch.zeros(1, dtype=torch.int32, device=device)
        # How many of those that share the digits so far are among the largest.
        needed = torch.full((1,), count, dtype=torch.int64, device=device)
        for shift, bits in DIGITS:
            counts = torch.zeros((COPIES, 1 << bits), dtype=torch.int32, device=device)
            constants = {"SHIFT": shift, "BITS": bits, "BLOCK": BLOCK, "COPIES": COPIES}
            launch(count_digits, grid, (magnitudes, threshold, counts), length, **constants)
            # Of this digit or a larger one.
            reach = counts.sum(0).flip(0).cumsum(0)
            larger = (reach < needed).sum().view(1)
            needed = needed - torch.where(larger > 0, reach[(larger - 1).clamp(min=0)], 0)
            threshold = (threshold << bits) + ((1 << bits) - 1 - larger).to(torch.int32)
        above, equal = (torch.empty(grid[0], dtype=torch.int32, device=device) for _ in range(2))
        launch(count_chosen, grid, (magnitudes, threshold, above, equal), length, BLOCK=BLOCK)
        before = [counted.cumsum(0) - counted for counted in (above, equal)]
        positions = torch.empty(count, dtype=torch.int64, device=device)
        launch(write_chosen, grid, (magnitudes, threshold, needed, *before, positions), length, BLOCK=BLOCK)
        return positions
