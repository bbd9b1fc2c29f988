"""One stage of ``pipeline.py``: times steps of each method on the same data and prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from exchange_worker import wire_bytes
from mpi4py import MPI
from torch import nn

from hvd_qsgd import QSGD, Cast, MinMax, TopK
from hvd_qsgd.pipeline import Direction, Pipeline

#: Compression of activations and of gradients.
METHODS: dict[str, tuple[Direction, Direction]] = {
    "none": (Direction(), Direction()),
    "fp16": (Direction(Cast()), Direction(Cast())),
    "qsgd 8/8": (Direction(QSGD(8)), Direction(QSGD(8))),
    "minmax 8 / qsgd 8": (Direction(MinMax(8)), Direction(QSGD(8))),
    "qsgd 4/4": (Direction(QSGD(4)), Direction(QSGD(4))),
    "aq-sgd 4 / qsgd 8": (Direction(QSGD(4), "aq-sgd"), Direction(QSGD(8))),
    "topk 10 % shared": (Direction(TopK(0.1), per_sample=True), Direction(shared_mask=True)),
}


def make_stages(width: int, hidden: int) -> list[nn.Module]:
    """Four stages that compute little and send much."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(4)]


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, and what this host sent in one; two steps to warm up."""
    forward, backward = METHODS[method]
    world = MPI.COMM_WORLD
    stages = make_stages(arguments.width, arguments.hidden)
    with Pipeline(stages, forward=forward, backward=backward, micro_batches=arguments.micro_batches) as pipeline:
        inputs, targets = (torch.randn(arguments.batch, arguments.width) for _ in range(2))
        samples = np.arange(arguments.batch)
        seconds: list[float] = []
        before = 0
        for step in range(arguments.repeats + 2):
            world.Barrier()
            if step == 2:
                before = wire_bytes()
                pipeline.transport.flush()
            started = time.perf_counter()
            pipeline.train_step(nn.functional.mse_loss, inputs, targets, samples=samples)
            world.Barrier()
            seconds.append(time.perf_counter() - started)
        sent = (wire_bytes() - before) / arguments.repeats
    return {"seconds": statistics.median(seconds[2:]), "all": seconds[2:], "bytes": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {method: measure(method, arguments) for method in arguments.methods}
    gathered = MPI.COMM_WORLD.gather(results)
    if gathered is not None:
        total = {
            method: {
                "seconds": max(stage[method]["seconds"] for stage in gathered),
                "all": gathered[0][method]["all"],
                "bytes": sum(stage[method]["bytes"] for stage in gathered),
                "busiest": max(stage[method]["bytes"] for stage in gathered),
            }
            for method in arguments.methods
        }
        # In one write, because mpirun tags each.
        print("RESULT " + json.dumps(total) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
