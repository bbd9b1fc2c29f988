"""Train a network in stages, one a rank, with or without compression between them: on MNIST, or on data that you have.

mpirun -np 4 python examples/pipeline.py --bits 4
horovodrun -np 4 python examples/pipeline.py --codec topk --ratio 0.1
horovodrun -np 4 python examples/pipeline.py --stages 2     # two replicas of two stages; Horovod averages gradients
python examples/pipeline.py --simulate                      # the same numbers in one process
mpirun -np 4 python examples/pipeline.py --task cifar10 --data cifar-10-batches-py
mpirun -np 4 python examples/pipeline.py --task gpt2 --data wikitext-2 --model gpt2 --codec topk --ratio 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pipeline_tasks import TASKS, Task, joined, make_task

from hvd_qsgd import QSGD, MinMax, TopK
from hvd_qsgd.pipeline import Direction, Pipeline, SimulatedPipeline


def directions(codec: str, bits: int, ratio: float, feedback: str) -> tuple[Direction, Direction]:
    """Compression of activations and of gradients."""
    if codec == "none":
        return Direction(), Direction()
    if codec == "topk":
        # Gradients follow the mask of the activations: values only.
        return Direction(TopK(ratio), feedback, per_sample=True), Direction(shared_mask=True)
    # Activations after a ReLU are one-sided; gradients are not.
    return Direction(MinMax(bits), feedback), Direction(QSGD(bits))


def make_optimizer(task: Task, pipeline: Any) -> torch.optim.Optimizer:
    """That of the task; with replicas, Horovod averages the gradients of each stage, compressed to 8 bits."""
    optimizer: Any = task.optimizer(list(pipeline.parameters()))
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


def train(task: Task, pipeline: Any, epochs: int, seed: int) -> None:
    """All ranks read the same batches; a replica takes its part of each."""
    optimizer = make_optimizer(task, pipeline)
    generator = torch.Generator().manual_seed(seed)
    replica, replicas = getattr(pipeline, "replica", 0), getattr(pipeline, "replicas", 1)
    for epoch in range(epochs):
        pipeline.set_epoch(epoch)
        losses = []
        for batch in torch.randperm(len(task.inputs), generator=generator).split(task.batch_size):
            rows = batch[replica::replicas]
            optimizer.zero_grad()
            data = task.inputs[rows], task.targets[rows]
            losses.append(pipeline.train_step(task.loss, *data, samples=rows.numpy()))
            optimizer.step()
        measured = task.test(pipeline)
        # Outputs are where the last stage is.
        if measured is not None and replica == 0:
            result = f"loss {measured:.4f} in testing" if task.is_text else f"accuracy {measured:.1f}%"
            print(f"epoch {epoch + 1:2}: loss {sum(losses) / len(losses):.4f}, {result}\n", end="", flush=True)
    print(f"{pipeline.stats()}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="mnist", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where CIFAR-10 or WikiText is")
    parser.add_argument("--model", type=Path, metavar="DIR", help="where GPT-2 is: configuration, tokenizer, weights")
    parser.add_argument("--codec", choices=["none", "quantize", "topk"], default="quantize")
    parser.add_argument("--bits", type=int, default=8, help="of activations and gradients (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.3, help="part that topk sends (default: %(default)s)")
    parser.add_argument("--feedback", default="none", help="none, ef, ef-mixed, ef21 or aq-sgd (default: %(default)s)")
    parser.add_argument("--stages", type=int, choices=[1, 2, 4], default=4, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="all stages in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    task = make_task(arguments.task, arguments.data, arguments.model)
    stages = joined(task.stages, arguments.stages)
    forward, backward = directions(arguments.codec, arguments.bits, arguments.ratio, arguments.feedback)
    if arguments.simulate:
        pipeline = SimulatedPipeline(stages, forward=forward, backward=backward)
        train(task, pipeline, arguments.epochs, arguments.seed)
        return
    with Pipeline(stages, forward=forward, backward=backward) as pipeline:
        train(task, pipeline, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
