"""What ``exchange_worker.py`` times, with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import peers
import torch
from resnet50 import ResNet50

from hvd_qsgd.torch import CastCompressor, PowerSGDCompressor, QSGDCompressor, TopKCompressor

__all__ = [
    "CastCompressor",
    "PowerSGDCompressor",
    "QSGDCompressor",
    "TopKCompressor",
    "barrier",
    "hvd",
    "one_tensor",
    "peers",
    "prepare",
    "training",
]


def prepare() -> None:
    torch.set_num_threads(1)


def barrier() -> None:
    hvd.barrier()


def one_tensor(compression: Any, name: str, elements: int) -> Callable[[], object]:
    """A step that averages one tensor."""
    torch.manual_seed(hvd.rank())
    x = torch.randn(elements // 1000, 1000)

    def step() -> None:
        hvd.allreduce(x, name=name, compression=compression)

    return step


def training(compression: Any, name: str, batch: int, pixels: int) -> Callable[[], object]:
    """A training step of ResNet-50; without any communication if ``compression`` is None."""
    torch.manual_seed(0)
    model: torch.nn.Module = ResNet50()
    if compression in peers.HOOKS:
        model, compression = peers.wrap(model, compression), None
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4)
    if compression is not None:
        # Methods that take turns in one job need names of their own.
        names = [(f"{name}.{parameter_name}", parameter) for parameter_name, parameter in model.named_parameters()]
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, compression=compression)
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step
