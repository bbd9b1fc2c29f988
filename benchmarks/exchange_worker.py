"""One rank of ``exchange.py``: times all methods in turns on the same data and prints one line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: From the module with a framework's steps to what is passed as compression=; None communicates nothing.
METHODS: dict[str, Callable[[Any], Any]] = {
    "local": lambda module: None,
    "none": lambda module: module.hvd.Compression.none,
    "fp16": lambda module: module.hvd.Compression.fp16,
    "cast": lambda module: module.CastCompressor(),
    "qsgd2": lambda module: module.QSGDCompressor(2, 128),
    "qsgd4": lambda module: module.QSGDCompressor(4),
    "qsgd8": lambda module: module.QSGDCompressor(8),
    "qsgd4-allgather": lambda module: module.QSGDCompressor(4, exchange="allgather"),
    "qsgd4-scatter": lambda module: module.QSGDCompressor(4, exchange="scatter_gather"),
    "qsgd4-allreduce": lambda module: module.QSGDCompressor(4, exchange="allreduce"),
    "qsgd4-thread": lambda module: module.QSGDCompressor(4, progress_thread=True),
    "qsgd4-scatter-thread": lambda module: module.QSGDCompressor(4, exchange="scatter_gather", progress_thread=True),
    "qsgd4-auto": lambda module: module.QSGDCompressor(4, exchange="auto"),
    "topk": lambda module: module.TopKCompressor(0.01),
    # Of torch, in training steps only: what PyTorch itself offers.
    "ddp": lambda module: module.peers.plain,
    "ddp-fp16": lambda module: module.peers.fp16,
    "ddp-powersgd": lambda module: module.peers.powersgd,
    # Of this package, with the same rank.
    "powersgd": lambda module: module.PowerSGDCompressor(4),
}


def wire_bytes() -> int:
    """Bytes that this host has sent over its network; 0 where it has no ``eth0``."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def measure(
    steps: dict[str, Callable[[], object]], repeats: int, barrier: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Median seconds and mean bytes of each step, after two to warm up.

    The steps take turns, so that whatever slows the machine slows all of them, and all ranks start each one together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(2 + repeats):
        for name, step in steps.items():
            barrier()
            before, started = wire_bytes(), time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
            barrier()
            sent[name].append(wire_bytes() - before)
    return {
        name: {"seconds": statistics.median(times[2:]), "all": times[2:], "bytes": statistics.mean(sent[name][2:])}
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["torch", "tensorflow", "gpu"], default="torch")
    parser.add_argument("--workload", choices=["tensor", "resnet50"], default="tensor")
    parser.add_argument("--methods", nargs="+", default=["none", "qsgd4"], choices=list(METHODS))
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=64)
    arguments = parser.parse_args()
    module = importlib.import_module(f"steps_{arguments.framework}")
    module.hvd.init()
    module.prepare()
    steps = {}
    for method in arguments.methods:
        compression = METHODS[method](module)
        if arguments.workload == "tensor":
            steps[method] = module.one_tensor(compression, method, arguments.elements)
        else:
            steps[method] = module.training(compression, method, arguments.batch, arguments.pixels)
    results = measure(steps, arguments.repeats, module.barrier)
    gathered = module.hvd.allgather_object(results)
    if module.hvd.rank() == 0:
        # The slowest rank counts; in one write, because mpirun tags each.
        worst = {m: max((rank[m] for rank in gathered), key=lambda r: r["seconds"]) for m in results}
        print("RESULT " + json.dumps(worst) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
