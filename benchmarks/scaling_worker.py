"""One rank of ``scaling.py``: measures this network and machine, then the exchanges themselves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import horovod.torch as hvd
import numpy as np
import torch

from hvd_qsgd import QSGD
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.reduction.progress import run_exchange
from hvd_qsgd.torch import QSGDCompressor
from hvd_qsgd.tuning.cost import UNCOMPRESSED, measure_costs


def seconds(exchange: str, elements: int, repeats: int) -> float:
    """Median time of an allreduce; the slowest rank counts."""
    x = torch.ones(elements // 1000, 1000)
    compression = hvd.Compression.none if exchange == UNCOMPRESSED else QSGDCompressor(exchange=exchange)
    times = []
    for _ in range(1 + repeats):
        hvd.barrier()
        started = time.perf_counter()
        hvd.allreduce(x, name=f"{exchange}.{elements}", compression=compression)
        times.append(time.perf_counter() - started)
    return float(max(hvd.allgather_object(statistics.median(times[1:]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    kernels = kernels_for(QSGD(), "numba")
    costs = run_exchange(measure_costs(kernels, hvd.size(), np.empty, "costs"), HorovodCollectives())
    measured = [
        {"exchange": exchange, "elements": elements, "seconds": seconds(exchange, elements, arguments.repeats)}
        for elements in arguments.elements
        for exchange in (UNCOMPRESSED, *exchanges_for(QSGD()))
    ]
    if hvd.rank() == 0:
        result = {"ranks": hvd.size(), "costs": dataclasses.asdict(costs), "measured": measured}
        # In one write, because mpirun tags each.
        print("RESULT " + json.dumps(result) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
