"""Train a network on MNIST in stages, one a rank, with or without compression between them.

mpirun -np 4 python examples/pipeline.py --bits 4
horovodrun -np 4 python examples/pipeline.py --codec topk --ratio 0.1
horovodrun -np 4 python examples/pipeline.py --stages 2     # two replicas of two stages; Horovod averages gradients
python examples/pipeline.py --simulate                      # the same numbers in one process
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from mnist import Net, load_mnist
from torch.nn.functional import cross_entropy

from hvd_qsgd import QSGD, MinMax, TopK
from hvd_qsgd.pipeline import Direction, Pipeline, SimulatedPipeline, split

BATCH_SIZE = 100
LEARNING_RATE = 0.05
MOMENTUM = 0.5
#: Where the layers of the network are cut, by number of stages.
CUTS = {1: [], 2: [6], 4: [3, 6, 9]}


def directions(codec: str, bits: int, ratio: float, feedback: str) -> tuple[Direction, Direction]:
    """Compression of activations and of gradients."""
    if codec == "none":
        return Direction(), Direction()
    if codec == "topk":
        # Gradients follow the mask of the activations: values only.
        return Direction(TopK(ratio), feedback, per_sample=True), Direction(shared_mask=True)
    # Activations after a ReLU are one-sided; gradients are not.
    return Direction(MinMax(bits), feedback), Direction(QSGD(bits))


def make_optimizer(pipeline: Any) -> torch.optim.Optimizer:
    """SGD; with replicas, Horovod averages the gradients of each stage, compressed to 8 bits."""
    optimizer: Any = torch.optim.SGD(pipeline.parameters(), LEARNING_RATE, MOMENTUM)
    if getattr(pipeline, "replicas", 1) > 1:
        import horovod.torch as hvd

        from hvd_qsgd.pipeline.transport_horovod import stage_sets
        from hvd_qsgd.torch import QSGDCompressor

        hvd.init()
        optimizer = hvd.DistributedOptimizer(
            optimizer,
            pipeline.named_parameters(),
            compression=QSGDCompressor(8),
            backward_passes_per_step=pipeline.micro_batches,
            process_set=stage_sets(len(pipeline.stages))[pipeline.stage],
        )
    return optimizer  # type: ignore[no-any-return]


def train(pipeline: Any, epochs: int, seed: int) -> None:
    """All ranks read the same batches; a replica takes its part of each."""
    train_set, test_set = load_mnist()
    images, digits = train_set.tensors
    optimizer = make_optimizer(pipeline)
    generator = torch.Generator().manual_seed(seed)
    replica, replicas = getattr(pipeline, "replica", 0), getattr(pipeline, "replicas", 1)
    for epoch in range(epochs):
        pipeline.set_epoch(epoch)
        losses = []
        for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            rows = batch[replica::replicas]
            optimizer.zero_grad()
            losses.append(pipeline.train_step(cross_entropy, images[rows], digits[rows], samples=rows.numpy()))
            optimizer.step()
        predicted = pipeline.predict(test_set.tensors[0])
        # Outputs are where the last stage is.
        if predicted is not None and replica == 0:
            accuracy = float((predicted.argmax(1) == test_set.tensors[1]).float().mean())
            loss = sum(losses) / len(losses)
            print(f"epoch {epoch + 1:2}: loss {loss:.4f}, accuracy {accuracy:.1%}\n", end="", flush=True)
    print(f"{pipeline.stats()}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", choices=["none", "quantize", "topk"], default="quantize")
    parser.add_argument("--bits", type=int, default=8, help="of activations and gradients (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.3, help="part that topk sends (default: %(default)s)")
    parser.add_argument("--feedback", default="none", help="none, ef, ef-mixed, ef21 or aq-sgd (default: %(default)s)")
    parser.add_argument("--stages", type=int, choices=list(CUTS), default=4, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="all stages in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    stages = split(Net(), CUTS[arguments.stages])
    forward, backward = directions(arguments.codec, arguments.bits, arguments.ratio, arguments.feedback)
    if arguments.simulate:
        train(SimulatedPipeline(stages, forward=forward, backward=backward), arguments.epochs, arguments.seed)
        return
    with Pipeline(stages, forward=forward, backward=backward) as pipeline:
        train(pipeline, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
