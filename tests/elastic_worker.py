"""One worker of ``test_elastic.py``: trains under ``hvd.elastic.run`` and logs what happens at each step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch

from hvd_qsgd.torch import TopKCompressor

#: No step lasts less, so that the test can interfere in time.
PAUSE = 0.05


def main(directory: str) -> None:
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.standard_normal((512, 64)).astype(np.float32))
    targets = inputs @ torch.from_numpy(rng.standard_normal((64, 40)).astype(np.float32))
    model = torch.nn.Linear(64, 40, bias=False)
    compressor = TopKCompressor(0.1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.0), model.named_parameters(), compression=compressor
    )
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compressor=compressor, step=0)
    host = os.environ["HOROVOD_HOSTNAME"]
    log = Path(directory, f"{host}-{os.getpid()}.jsonl")

    def residual() -> torch.Tensor:
        arrays = compressor.state_dict()["arrays"]
        return arrays.get("residual/weight", torch.zeros(64 * 40))

    def mean_residual() -> list[float]:
        return hvd.allreduce(residual(), name="residual")[:5].tolist()

    def all_told_to_stop() -> bool:
        told = torch.tensor(float(Path(directory, "stop").exists()))
        return float(hvd.allreduce(told, name="stop")) == 1.0

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        start = mean_residual()
        while not all_told_to_stop():
            time.sleep(PAUSE)
            rows = slice(hvd.rank(), None, hvd.size())
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs[rows]), targets[rows])
            loss.backward()
            if Path(directory, f"die-{host}").exists():
                # In the middle of a step: the gradients of all ranks are on their way.
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            state.step += 1
            entry = {"step": state.step, "ranks": hvd.size(), "rank": hvd.rank(), "loss": float(loss)}
            entry["weights"] = float(model.weight.detach().double().sum())
            entry.update(own=residual()[:5].tolist(), mean=mean_residual(), start=start)
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            state.commit()

    train(state)


if __name__ == "__main__":
    main(sys.argv[1])
