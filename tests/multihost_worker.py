"""Measure what some work sends over the network. Started by ``test_multihost.py`` on every emulated host.

For each named piece of work the first rank prints one line of JSON: the bytes that every rank's interface sent and
received during the steps alone, and what is needed to see that the work was done correctly. With ``--until-lost FILE``
the last named work goes on for ever, and FILE appears when it is under way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

INTERFACE = "eth0"
ALLREDUCE_ELEMENTS = 1_000_000
INPUTS, OUTPUTS, BATCH, LEARNING_RATE = 1024, 2048, 32, 0.02
#: Steps before ``--until-lost`` says that it is under way.
WARM_UP = 3

#: One step of some work; training returns its loss.
Step = Callable[[], float]


def load_compression(name: str) -> Any:
    if name in ("none", "fp16"):
        return getattr(hvd.Compression, name)
    from hvd_qsgd.torch import QSGDCompressor, TopKCompressor

    return QSGDCompressor if name == "qsgd" else TopKCompressor(ratio=0.01)


def make_allreduce() -> tuple[Step, torch.Tensor]:
    tensor = torch.ones(ALLREDUCE_ELEMENTS)

    def step() -> float:
        hvd.allreduce_(tensor, op=hvd.Average, name="meter")
        return 0.0

    return step, tensor


def make_training(compression: Any) -> tuple[Step, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(INPUTS, OUTPUTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    generator = torch.Generator().manual_seed(1 + hvd.rank())
    inputs = torch.randn(BATCH, INPUTS, generator=generator)
    targets = torch.randn(BATCH, OUTPUTS, generator=generator)

    def step() -> float:
        optimizer.zero_grad()
        # A sum over the outputs keeps the gradients far above the smallest numbers of fp16.
        loss = 0.5 * (model(inputs) - targets).square().sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, model.weight


def read_counter(name: str) -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/{name}").read_text())


def measure(name: str, steps: int) -> dict[str, Any]:
    step, result = make_allreduce() if name == "allreduce" else make_training(load_compression(name))
    # Between the barriers nothing travels but the steps, so that starting up is not counted.
    hvd.barrier()
    sent, received = read_counter("tx_bytes"), read_counter("rx_bytes")
    losses = [step() for _ in range(steps)]
    hvd.barrier()
    return {
        "name": name,
        "sent": read_counter("tx_bytes") - sent,
        "received": read_counter("rx_bytes") - received,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "checksum": zlib.crc32(result.detach().numpy().tobytes()),
    }


def go_on(name: str, under_way: Path) -> None:
    step, _ = make_training(load_compression(name))
    for number in itertools.count():
        step()
        if number == WARM_UP and hvd.rank() == 0:
            under_way.touch()
        if number == WARM_UP and os.environ.get("SLEEPING_RANK") == str(hvd.rank()):
            time.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    work = ("allreduce", "none", "fp16", "qsgd", "topk")
    parser.add_argument("--compression", nargs="+", choices=work, required=True, help="'allreduce' does not train")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--until-lost", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    hvd.init()
    if arguments.until_lost:
        go_on(arguments.compression[-1], arguments.until_lost)
    for name in arguments.compression:
        reports = hvd.allgather_object(measure(name, arguments.steps))
        if hvd.rank() == 0:
            # In one write: mpirun puts a tag before every piece of output that it sees.
            sys.stdout.write(json.dumps(reports) + "\n")
            sys.stdout.flush()
    hvd.shutdown()


if __name__ == "__main__":
    main()
