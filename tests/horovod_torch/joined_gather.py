"""A gather that Horovod has done before, with a rank that has joined since: Horovod 0.28 tries, and breaks down.

The job has to end with an error, and nobody may take what came for a gradient. ``test_horovod_torch.py`` starts this.
"""

from __future__ import annotations

import sys

import horovod.torch as hvd
import torch

from hvd_qsgd.torch import QSGDCompressor


def main(exchange: str) -> None:
    hvd.init()
    compressor = QSGDCompressor(exchange=exchange)
    for _ in range(3):
        hvd.allreduce(torch.ones(40, 50), name="x", compression=compressor)
    if hvd.rank() < hvd.size() - 1:
        result = hvd.allreduce(torch.ones(40, 50), name="x", compression=compressor)
        print(f"\nRESULT {result.mean()}", flush=True)
    hvd.join()


if __name__ == "__main__":
    main(sys.argv[1])
