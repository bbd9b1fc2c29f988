"""Runs the Python of README and docs on every rank of a job, in a directory that all ranks share.

Pages are run from top to bottom, with the variables that their readers have.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

import hvd_qsgd.torch

ROOT = Path(__file__).resolve().parent.parent
#: Those for torch; test_docs.py looks at the others without running them.
PAGES = ["README.md", "docs/index.md", "docs/quick-start.md", "docs/family.md"]


def what_readers_have() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    compressor = hvd_qsgd.torch.TopKCompressor(ratio=0.1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compressor)
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "compressor": compressor,
        "epochs": 2,
        "hvd": hvd,
        "hvd_qsgd": hvd_qsgd,
        "learning_rate": 0.1,
        "model": model,
        "optimizer": plain,
        "torch": torch,
    }


def main() -> None:
    hvd.init()
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    if hvd.rank() == 0:
        Path("compression.yaml").write_text('"*.bias": none\ndefault: qsgd(4)\n')
    ran = 0
    for page in PAGES:
        variables = what_readers_have()
        hvd.barrier()
        for snippet in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(snippet, page, "exec"), variables)
            ran += 1
    # In one write, so that the launcher does not part it.
    sys.stdout.write(f"rank {hvd.rank()} ran {ran} snippets\n")
    hvd.shutdown()


if __name__ == "__main__":
    main()
