"""One rank of ``test_accuracy.py``: trains the example's network with each compression and seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import horovod.torch as hvd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from mnist_torch import make_compression, train


def main(output: str, epochs: int, seeds: int) -> None:
    hvd.init()
    torch.set_num_threads(1)
    accuracies: dict[str, list[float]] = {}
    for name in ("none", "qsgd", "topk"):
        for seed in range(seeds):
            result = train(make_compression(name, seed=seed), epochs, seed, lambda *_: None)
            assert len(set(result["checksums"])) == 1, "the ranks' weights differ"
            accuracies.setdefault(name, []).append(result["accuracy"])
    if hvd.rank() == 0:
        Path(output).write_text(json.dumps(accuracies))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
