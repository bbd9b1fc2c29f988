"""What watching costs: steps with and without a monitor, in turns.

    horovodrun -np 2 python benchmarks/monitor.py                          # gradients with the shapes of ResNet-50
    horovodrun -np 2 python benchmarks/monitor.py --framework tensorflow
    horovodrun -np 2 python benchmarks/monitor.py --quick                  # a smoke test

A step here is what compression does in one: gradients arrive, are exchanged and come back, without forward and
backward pass, so that the share that watching takes is larger than in a training. What is compared (medians): steps
without a monitor, steps whose errors are measured and written, and what a monitor does in all other steps, which is
too little to be seen in a difference and is timed by itself. With torch it is the processor time of the training
thread, which other programs disturb less than the time on a clock; TensorFlow's work is done by threads of its own,
so there it is the time on a clock.
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
from typing import Any

from hvd_qsgd.observe import JsonLines, LogLines, Monitor

NEVER = 2**40
Shapes = list[tuple[int, ...]]


class Torch:
    """Gradients of torch."""

    clock = staticmethod(time.thread_time)

    def __init__(self) -> None:
        import horovod.torch as hvd
        import torch

        from hvd_qsgd.torch import QSGDCompressor, TopKCompressor

        self.hvd, self.torch = hvd, torch
        self.compressors = {"QSGD, 4 bits": QSGDCompressor, "TopK, 1 %": TopKCompressor}
        hvd.init()
        torch.set_num_threads(1)

    def make_step(self, name: str, compression: Any, shapes: Shapes) -> Callable[[], object]:
        """A function that hands in the same gradients each time and waits for their means."""
        torch = self.torch
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        gradients = [torch.randn(shape) for shape in shapes]
        named = [(f"{name}.{i}", parameter) for i, parameter in enumerate(parameters)]
        optimizer = self.hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), named_parameters=named, compression=compression
        )

        def step() -> None:
            optimizer.zero_grad()
            # Exchanges write over what they are handed.
            copies = [gradient.clone() for gradient in gradients]
            torch.autograd.backward(parameters, copies)
            optimizer.synchronize()

        return step

    def barrier(self) -> None:
        self.hvd.barrier()


class TensorFlow:
    """Gradients of TensorFlow, in a graph."""

    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        import steps_tensorflow

        self.hvd, self.prepared = steps_tensorflow.hvd, steps_tensorflow
        self.compressors = {
            "QSGD, 4 bits": steps_tensorflow.QSGDCompressor,
            "TopK, 1 %": steps_tensorflow.TopKCompressor,
        }
        self.hvd.init()
        steps_tensorflow.prepare()

    def make_step(self, name: str, compression: Any, shapes: Shapes) -> Callable[[], object]:
        """A function that hands in the same gradients each time and waits for their means."""
        tf, hvd = self.prepared.tf, self.hvd
        variables = [tf.Variable(tf.zeros(shape), name=f"{name}_{i}") for i, shape in enumerate(shapes)]
        gradients = [tf.Variable(tf.random.normal(shape)) for shape in shapes]

        @tf.custom_gradient
        def loss_of(*_: Any) -> Any:
            return tf.zeros(()), lambda *_, variables=None: [gradient.value() for gradient in gradients]

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(*variables)
            means = hvd.DistributedGradientTape(tape, compression=compression).gradient(loss, variables)
            # Something must ask for them.
            return tf.add_n([tf.reshape(mean, [-1])[0] for mean in means])

        return lambda: step().numpy()

    def barrier(self) -> None:
        self.prepared.barrier()


def counting_seconds(compressor: Any, tensors: int) -> float:
    """What a monitor does in a step that it only counts."""
    monitor = Monitor(LogLines(), every=NEVER)
    monitor.watch(compressor, lambda: (0, 2))
    keys = [str(i) for i in range(tensors)]
    steps = 1000
    begin = time.thread_time()
    for _ in range(steps):
        for key in keys:
            monitor.starts(key)
    seconds = (time.thread_time() - begin) / steps
    monitor.close()
    return seconds


def resnet50_shapes() -> Shapes:
    from resnet50 import ResNet50

    return [tuple(parameter.shape) for parameter in ResNet50().parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=["torch", "tensorflow"], default="torch", help="(default: torch)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=100, help="steps to a record, in the result (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two rounds, small tensors")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON here")
    arguments = parser.parse_args()
    framework = TensorFlow() if arguments.framework == "tensorflow" else Torch()
    logging.basicConfig(level=logging.ERROR)
    shapes = [(64, 64)] * 4 if arguments.quick else resnet50_shapes()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, make in framework.compressors.items():
            monitor = Monitor(LogLines(), JsonLines(Path(directory, f"{name}.jsonl")), every=1)
            steps = {
                "without": framework.make_step("without", make(), shapes),
                "measured": framework.make_step("measured", make(monitor=monitor), shapes),
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in steps}
            for _ in range(3 if arguments.quick else arguments.rounds + 1):
                for kind, step in steps.items():
                    framework.barrier()
                    begin = framework.clock()
                    step()
                    seconds[kind].append(framework.clock() - begin)
            monitor.close()
            medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
            medians["counted"] = counting_seconds(make(), len(shapes))
            added = medians["counted"] + (medians["measured"] - medians["without"]) / arguments.every
            result = results[name] = {**medians, "overhead": added / medians["without"]}
            if framework.hvd.rank() == 0:
                without, counted, measured = (f"{medians[k] * 1e3:.3g} ms" for k in ("without", "counted", "measured"))
                print(
                    f"{name}: {without} a step without a monitor, {counted} more with one, {measured} where errors are "
                    f"measured and a record is written: {result['overhead']:.2%} more with a record every "
                    f"{arguments.every} steps",
                    flush=True,
                )
    if arguments.output and framework.hvd.rank() == 0:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
