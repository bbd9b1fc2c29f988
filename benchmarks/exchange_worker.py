"""One rank of ``exchange.py``: times all methods in turns on the same data and prints one line of JSON."""

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
from peers import PEERS, wrap
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
    "qsgd4-auto": lambda: QSGDCompressor(4, exchange="auto"),
    "topk": lambda: TopKCompressor(0.01),
}


def wire_bytes() -> int:
    """Bytes that this host has sent over its network; 0 where it has no ``eth0``."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds and mean bytes of each step, after two to warm up.

    The steps take turns, so that whatever slows the machine slows all of them, and all ranks start each one together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(2 + repeats):
        for name, step in steps.items():
            hvd.barrier()
            before, started = wire_bytes(), time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
            hvd.barrier()
            sent[name].append(wire_bytes() - before)
    return {
        name: {"seconds": statistics.median(times[2:]), "all": times[2:], "bytes": statistics.mean(sent[name][2:])}
        for name, times in seconds.items()
    }


def one_tensor(method: str, elements: int) -> Callable[[], None]:
    torch.manual_seed(hvd.rank())
    x = torch.randn(elements // 1000, 1000)
    compression = METHODS[method]()
    return lambda: hvd.allreduce(x, name=f"x.{method}", compression=compression)


def training(method: str, batch: int, pixels: int) -> Callable[[], None]:
    """A step of ResNet-50; "local" is the same step without any communication."""
    torch.manual_seed(0)
    model: torch.nn.Module = ResNet50()
    if method in PEERS:
        model = wrap(method, model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4)
    if method in METHODS:
        # Methods that take turns in one job need names of their own.
        names = [(f"{method}.{name}", parameter) for name, parameter in model.named_parameters()]
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, compression=METHODS[method]())
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["tensor", "resnet50"], default="tensor")
    parser.add_argument("--methods", nargs="+", default=["none", "qsgd4"], choices=[*METHODS, *PEERS, "local"])
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=64)
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    if arguments.workload == "tensor":
        steps = {method: one_tensor(method, arguments.elements) for method in arguments.methods}
    else:
        steps = {method: training(method, arguments.batch, arguments.pixels) for method in arguments.methods}
    results = measure(steps, arguments.repeats)
    gathered = hvd.allgather_object(results)
    if hvd.rank() == 0:
        # The slowest rank counts; in one write, because mpirun tags each.
        worst = {m: max((rank[m] for rank in gathered), key=lambda r: r["seconds"]) for m in results}
        print("RESULT " + json.dumps(worst) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
