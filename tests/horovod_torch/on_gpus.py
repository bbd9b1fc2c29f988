"""Started by ``tests/test_gpu.py``: a rank for each GPU, gradients from side streams, bits compared with the CPU."""

from __future__ import annotations

import contextlib

import horovod.torch as hvd
import torch
from rank_checks import normal

from hvd_qsgd.torch import QSGDCompressor


def main() -> None:
    hvd.init()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", hvd.local_rank()) if on_gpu else torch.device("cpu")
    for exchange in ("allgather", "scatter_gather", "allreduce"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            here, there = (QSGDCompressor(exchange=exchange) for _ in range(2))
            for seed in range(3):
                x = normal((1000, 1000), seed).to(dtype)
                expected = hvd.allreduce(x, name="x", compression=here)
                with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
                    result = hvd.allreduce(x.to(device), name="x", compression=there).cpu()
                assert torch.equal(result, expected), (exchange, dtype, seed)
    print("SAME BITS", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
