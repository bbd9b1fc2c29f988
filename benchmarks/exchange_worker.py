"""One rank of ``exchange.py``: times each method on the same data and prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from resnet50 import ResNet50

from hvd_qsgd.torch import CastCompressor, QSGDCompressor, TopKCompressor

METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: hvd.Compression.none,
    "fp16": lambda: hvd.Compression.fp16,
    "cast": CastCompressor,
    "qsgd2": lambda: QSGDCompressor(2, 128),
    "qsgd4": lambda: QSGDCompressor(4),
    "qsgd8": lambda: QSGDCompressor(8),
    "qsgd4-allgather": lambda: QSGDCompressor(4, exchange="allgather"),
    "qsgd4-scatter": lambda: QSGDCompressor(4, exchange="scatter_gather"),
    "qsgd4-allreduce": lambda: QSGDCompressor(4, exchange="allreduce"),
    "topk": lambda: TopKCompressor(0.01),
}


def wire_bytes() -> int:
    """Bytes that this host has sent over its network; 0 where it has no ``eth0``."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def measure(step: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Median seconds of a step, after one to warm up; all ranks start each step together."""
    step()
    seconds = []
    hvd.barrier()
    before = wire_bytes()
    for _ in range(repeats):
        hvd.barrier()
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    hvd.barrier()
    return {"seconds": statistics.median(seconds), "all": seconds, "bytes": (wire_bytes() - before) / repeats}


def one_tensor(method: str, elements: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(hvd.rank())
    x = torch.randn(elements // 1000, 1000)
    compression = METHODS[method]()

    def step() -> None:
        hvd.allreduce(x, name="x", compression=compression)

    return measure(step, repeats)


def training(method: str, repeats: int, batch: int, pixels: int) -> dict[str, Any]:
    """A step of ResNet-50; "local" is the same step without any communication."""
    torch.manual_seed(0)
    model = ResNet50()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4)
    if method != "local":
        optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), compression=METHODS[method]()
        )
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return measure(step, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["tensor", "resnet50"], default="tensor")
    parser.add_argument("--methods", nargs="+", default=["none", "qsgd4"], choices=[*METHODS, "local"])
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=64)
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    results = {}
    for method in arguments.methods:
        if arguments.workload == "tensor":
            results[method] = one_tensor(method, arguments.elements, arguments.repeats)
        else:
            results[method] = training(method, arguments.repeats, arguments.batch, arguments.pixels)
    gathered = hvd.allgather_object(results)
    if hvd.rank() == 0:
        # The slowest rank counts; in one write, because mpirun tags each.
        worst = {m: max((rank[m] for rank in gathered), key=lambda r: r["seconds"]) for m in results}
        print("RESULT " + json.dumps(worst) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
