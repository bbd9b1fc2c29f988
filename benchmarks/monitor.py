"""What watching costs: steps with and without a monitor, in turns.

    horovodrun -np 2 python benchmarks/monitor.py           # gradients with the shapes of ResNet-50
    horovodrun -np 2 python benchmarks/monitor.py --quick   # a smoke test

A step here is what compression does in one: gradients arrive, are exchanged and come back, without forward and
backward pass, so that the share that watching takes is larger than in a training. What is compared is the processor
time of the training thread (medians), which other programs disturb less than the time on a clock: of steps without a
monitor, of steps whose errors are measured and written, and of what a monitor does in all other steps, which is too
little to be seen in a difference and is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import horovod.torch as hvd
import torch
from resnet50 import ResNet50

from hvd_qsgd.observe import JsonLines, LogLines, Monitor
from hvd_qsgd.torch import Compressor, QSGDCompressor, TopKCompressor

NEVER = 2**40


def make_step(name: str, compression: Compressor, shapes: list[torch.Size]) -> Callable[[], None]:
    """A function that hands in the same gradients each time and waits for their means."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    named = [(f"{name}.{i}", parameter) for i, parameter in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), named_parameters=named, compression=compression
    )

    def step() -> None:
        optimizer.zero_grad()
        # Exchanges write over what they are handed.
        copies = [gradient.clone() for gradient in gradients]
        torch.autograd.backward(parameters, copies)
        optimizer.synchronize()

    return step


def thread_seconds(step: Callable[[], None]) -> float:
    hvd.barrier()
    begin = time.thread_time()
    step()
    return time.thread_time() - begin


def counting_seconds(tensors: int) -> float:
    """What a monitor does in a step that it only counts."""
    monitor = Monitor(LogLines(), every=NEVER)
    monitor.watch(QSGDCompressor(), lambda: (0, 2))
    keys = [str(i) for i in range(tensors)]
    steps = 1000
    begin = time.thread_time()
    for _ in range(steps):
        for key in keys:
            monitor.starts(key)
    seconds = (time.thread_time() - begin) / steps
    monitor.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=100, help="steps to a record, in the result (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two rounds, small tensors")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON here")
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    shapes = [torch.Size([64, 64])] * 4 if arguments.quick else [p.shape for p in ResNet50().parameters()]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, make in {"QSGD, 4 bits": QSGDCompressor, "TopK, 1 %": TopKCompressor}.items():
            monitor = Monitor(LogLines(), JsonLines(Path(directory, f"{name}.jsonl")), every=1)
            steps = {
                "without": make_step("without", make(), shapes),
                "measured": make_step("measured", make(monitor=monitor), shapes),
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in steps}
            for _ in range(3 if arguments.quick else arguments.rounds + 1):
                for kind, step in steps.items():
                    seconds[kind].append(thread_seconds(step))
            monitor.close()
            medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
            medians["counted"] = counting_seconds(len(shapes))
            added = medians["counted"] + (medians["measured"] - medians["without"]) / arguments.every
            result = results[name] = {**medians, "overhead": added / medians["without"]}
            if hvd.rank() == 0:
                without, counted, measured = (f"{medians[k] * 1e3:.3g} ms" for k in ("without", "counted", "measured"))
                print(
                    f"{name}: {without} a step without a monitor, {counted} more with one, {measured} where errors are "
                    f"measured and a record is written: {result['overhead']:.2%} more with a record every "
                    f"{arguments.every} steps",
                    flush=True,
                )
    if arguments.output and hvd.rank() == 0:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
