"""In the fourth step the last rank dies, or stands still: the others have to learn which tensor waits for whom.

``test_horovod_torch.py`` starts this.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd.torch import TopKCompressor


def main(what: str) -> None:
    hvd.init()
    model = torch.nn.Linear(50, 40)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=TopKCompressor(0.1)
    )
    for step in range(6):
        if step == 3 and hvd.rank() == hvd.size() - 1:
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        optimizer.zero_grad()
        model(torch.ones(8, 50)).square().mean().backward()
        try:
            optimizer.step()
        except HorovodInternalError as error:
            print(f"\nREFUSED {error}", flush=True)
            # As an exception would, without the traces of both errors.
            os._exit(1)
        print(f"\nSTEP {step}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
