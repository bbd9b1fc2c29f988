"""Started by ``tests/test_gpu.py``: a rank for each GPU, gradients from side streams, bits compared with the CPU.

Before that, training whose forward and backward pass are CUDA graphs, compared with training by operations one at a
time. Runs on the CPU too, where both are the same.
"""

from __future__ import annotations

import contextlib

import horovod.torch as hvd
import torch
from rank_checks import normal

from hvd_qsgd.torch import QSGDCompressor


def trained(device: torch.device, graphed: bool) -> torch.Tensor:
    """Parameters after some steps, with a gradient scaler that meets an infinity in the third."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compression=QSGDCompressor()
    )
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    x = normal((32, 64), hvd.rank()).to(device)
    run = torch.cuda.make_graphed_callables(model, (x,)) if graphed else model
    for step in range(6):
        optimizer.zero_grad()
        loss = run(x).square().mean() * (float("inf") if step == 2 and hvd.rank() == 0 else 1.0)
        scaler.scale(loss).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main() -> None:
    hvd.init()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", hvd.local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    plain, graphed = (trained(device, graphs and on_gpu) for graphs in (False, True))
    assert torch.isfinite(plain).all()
    assert torch.equal(plain, graphed)
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
