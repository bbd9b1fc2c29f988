"""Horovod calls of the user's own while gradients are under way."""

from __future__ import annotations

import time

import horovod.torch as hvd
import pytest
import torch

from hvd_qsgd.torch import QSGDCompressor


@pytest.mark.parametrize("exchange", ["allgather", "scatter_gather", "allreduce"])
def test_an_unnamed_allreduce_between_backward_and_step(exchange: str) -> None:
    """Horovod names it after the number of collectives so far, which must not depend on a rank's speed."""
    parameter = torch.nn.Parameter(torch.zeros(60, 100))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        named_parameters=[("parameter", parameter)],
        compression=QSGDCompressor(exchange=exchange, fusion_elements=2000),
    )
    for step in range(10):
        optimizer.zero_grad()
        (parameter * torch.randn(60, 100)).sum().backward()
        time.sleep(0.003 * hvd.rank())
        assert hvd.allreduce(torch.tensor(float(step))) == step
        optimizer.step()
