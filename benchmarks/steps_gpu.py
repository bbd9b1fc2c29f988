"""What ``exchange_worker.py`` times on GPUs, one of them for each rank; on the CPU where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

from hvd_qsgd.torch import CastCompressor, QSGDCompressor, TopKCompressor

__all__ = ["CastCompressor", "QSGDCompressor", "TopKCompressor", "barrier", "hvd", "one_tensor", "prepare"]


def device() -> torch.device:
    return torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def prepare() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def barrier() -> None:
    hvd.barrier()


def one_tensor(compression: Any, name: str, elements: int) -> Callable[[], object]:
    """A step that averages one tensor and waits until the GPU has the result."""
    torch.manual_seed(hvd.rank())
    x = torch.randn(elements // 1000, 1000, device=device())

    def step() -> None:
        hvd.allreduce(x, name=name, compression=compression)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
