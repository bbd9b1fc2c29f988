"""Train on a Ray cluster through horovod.ray: two ranks, compressed.

python deploy/ray/train.py --ranks 2
"""

from __future__ import annotations

import argparse

import ray
from horovod.ray import RayExecutor


def train(steps: int) -> tuple[float, dict[str, int]]:
    """What every rank runs. Returns the last loss, and the bytes of gradients before and after compression."""
    import horovod.torch as hvd
    import torch

    from hvd_qsgd.torch import QSGDCompressor

    hvd.init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = QSGDCompressor(bits=4)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), compression=compression
    )
    torch.manual_seed(1 + hvd.rank())
    for _ in range(steps):
        x = torch.randn(32, 64)
        loss = torch.nn.functional.mse_loss(model(x), x[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), compression.stats().totals()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    ray.init(address=None)
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=60), num_workers=arguments.ranks, cpus_per_worker=1)
    executor.start()
    for rank, result in enumerate(executor.run(train, args=[arguments.steps])):
        print(f"rank {rank}: {result}")
    executor.shutdown()


if __name__ == "__main__":
    main()
