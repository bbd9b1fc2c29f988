"""Train a small network on MNIST with Horovod, with or without gradient compression.

horovodrun -np 2 python examples/mnist_torch.py --compression qsgd --bits 4
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from mnist import Net, accuracy, load_mnist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from hvd_qsgd.observe import JsonLines, Monitor
from hvd_qsgd.torch import Compressor, QSGDCompressor, TopKCompressor

BATCH_SIZE = 50  # of one worker
LEARNING_RATE = 0.04  # of one worker
MOMENTUM = 0.5


def make_compression(
    name: str, bits: int = 4, ratio: float = 0.01, seed: int = 0, monitor: Monitor | None = None
) -> Any:
    """What to pass as compression= to Horovod."""
    if name == "qsgd":
        return QSGDCompressor(bits=bits, seed=seed, monitor=monitor)
    if name == "topk":
        return TopKCompressor(ratio=ratio, seed=seed, monitor=monitor)
    return hvd.Compression.fp16 if name == "fp16" else hvd.Compression.none


def train(
    compression: Any, epochs: int, seed: int, on_epoch: Callable[[int, float, float, float], None]
) -> dict[str, Any]:
    """Train from scratch.

    Args:
        compression: for ``hvd.DistributedOptimizer``.
        epochs: how often to go through the images.
        seed: of the initial weights and the order of the images.
        on_epoch: called with the number of the epoch, loss, accuracy, and bytes sent so far.

    Returns:
        What happened, averaged over the ranks where they differ.
    """
    torch.manual_seed(seed)
    train_set, test_set = load_mnist()
    sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank(), seed=seed)
    loader = DataLoader(train_set, batch_size=BATCH_SIZE, sampler=sampler)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE * hvd.size(), momentum=MOMENTUM)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)

    losses: list[float] = []
    sent: list[float] = []
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        start = time.perf_counter()
        for images, digits in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), digits)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sent.append(bytes_sent(compression, model, steps=len(losses)))
        seconds += time.perf_counter() - start
        on_epoch(epoch, sum(losses[-len(loader) :]) / len(loader), accuracy(model, test_set), sent[-1])

    # The ranks see different images, and their compressed gradients may differ in size.
    losses, sent = hvd.allreduce(torch.tensor([losses, sent], dtype=torch.float64), name="history").tolist()
    return {
        "losses": losses,
        "bytes": sent,
        "accuracy": accuracy(model, test_set),
        "seconds": seconds,
        # One for each rank; they are equal if all ranks applied the same gradients.
        "checksums": hvd.allgather_object(checksum(model)),
    }


def bytes_sent(compression: Any, model: torch.nn.Module, steps: int) -> float:
    """Bytes of gradients that this rank has sent so far."""
    if isinstance(compression, Compressor):
        return compression.stats().wire_bytes
    # Horovod's own allreduce, run as a ring.
    element_size = 2 if compression is hvd.Compression.fp16 else 4
    gradients = sum(p.numel() for p in model.parameters()) * element_size
    return steps * 2 * (hvd.size() - 1) / hvd.size() * gradients


def checksum(model: torch.nn.Module) -> int:
    return zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", choices=["none", "fp16", "qsgd", "topk"], default="qsgd")
    parser.add_argument("--bits", type=int, default=4, help="for each number, with qsgd (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="part that topk sends (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write losses and bytes of all steps here")
    parser.add_argument("--records", type=Path, metavar="FILE", help="write records for `hvd-qsgd report` here")
    arguments = parser.parse_args()

    hvd.init()

    def print_epoch(epoch: int, loss: float, accuracy: float, sent: float) -> None:
        if hvd.rank() == 0:
            print(f"epoch {epoch:2}: loss {loss:.4f}, accuracy {accuracy:.1%}, sent {sent / 1e6:.2f} MB", flush=True)

    monitor = Monitor(JsonLines(arguments.records), every=10) if arguments.records else None
    compression = make_compression(arguments.compression, arguments.bits, arguments.ratio, arguments.seed, monitor)
    result = train(compression, arguments.epochs, arguments.seed, print_epoch)
    if arguments.json and hvd.rank() == 0:
        arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
