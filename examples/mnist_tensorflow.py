"""Train a small network on MNIST with Horovod and a training loop of TensorFlow.

horovodrun -np 2 python examples/mnist_tensorflow.py --compression qsgd --bits 4
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from mnist_data import load_images, split

from hvd_qsgd.tensorflow import Compressor, QSGDCompressor, TopKCompressor

SPLIT_SEED = 0
BATCH_SIZE = 50  # of one worker
LEARNING_RATE = 0.04  # of one worker
MOMENTUM = 0.5

Images = tuple[np.ndarray, np.ndarray]


def load_mnist() -> tuple[Images, Images]:
    """4,000 images for training and 1,000 for testing, always the same, with all digits equally often."""
    images, digits = load_images()
    train, test = split(digits, np.random.default_rng(SPLIT_SEED).permutation)
    return (images[train, ..., None], digits[train]), (images[test, ..., None], digits[test])


def make_network() -> keras.Model:
    """A convolutional network with 212,426 parameters, nearly all of them in the first dense layer."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPool2D(2),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


def make_optimizer() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(LEARNING_RATE * hvd.size(), momentum=MOMENTUM)


def make_compression(name: str, bits: int = 4, ratio: float = 0.01, seed: int = 0) -> Any:
    """What to pass as compression= to Horovod."""
    if name == "qsgd":
        return QSGDCompressor(bits=bits, seed=seed)
    if name == "topk":
        return TopKCompressor(ratio=ratio, seed=seed)
    return hvd.Compression.fp16 if name == "fp16" else hvd.Compression.none


def batches(images: Images, seed: int, epoch: int) -> Iterator[Images]:
    """This rank's part of the images, in an order that is new in each epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(images[1]))[hvd.rank() :: hvd.size()]
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        yield images[0][rows], images[1][rows]


def accuracy(model: keras.Model, images: Images) -> float:
    """The part of the images that the model recognizes."""
    return float(np.mean(np.argmax(model(images[0], training=False), axis=1) == images[1]))


def checksum(model: keras.Model) -> int:
    return zlib.crc32(b"".join(weight.numpy().tobytes() for weight in model.weights))


def train(compression: Any, epochs: int, seed: int, on_epoch: Callable[[int, float, float], None]) -> dict[str, Any]:
    """Train from scratch; ``on_epoch`` is called with the number of the epoch, the loss and the accuracy.

    Returns:
        What happened: losses are means over the ranks, there is a checksum for each rank.
    """
    keras.utils.set_random_seed(seed)
    train_set, test_set = load_mnist()
    model, optimizer = make_network(), make_optimizer()
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Horovod wants the variables of TensorFlow that are inside those of Keras 3.
    variables = [variable.value for variable in model.trainable_variables]
    hvd.broadcast_variables(variables, root_rank=0)

    @tf.function
    def step(images: tf.Tensor, digits: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(digits, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), model.trainable_variables))
        return loss

    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        of_epoch = [float(step(*batch)) for batch in batches(train_set, seed, epoch)]
        losses += of_epoch
        on_epoch(epoch, float(np.mean(of_epoch)), accuracy(model, test_set))
    return {
        "losses": hvd.allreduce(tf.constant(losses, tf.float64), name="losses").numpy().tolist(),
        "accuracy": accuracy(model, test_set),
        "parameters": model.count_params(),
        "bytes": compression.stats().wire_bytes if isinstance(compression, Compressor) else None,
        # They are equal if all ranks applied the same gradients.
        "checksums": hvd.allgather_object(checksum(model)),
    }


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", choices=["none", "fp16", "qsgd", "topk"], default="qsgd")
    parser.add_argument("--bits", type=int, default=4, help="for each number, with qsgd (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="part that topk sends (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened here")
    return parser.parse_args()


def print_epoch(epoch: int, loss: float, accuracy: float) -> None:
    if hvd.rank() == 0:
        print(f"epoch {epoch:2}: loss {loss:.4f}, accuracy {accuracy:.1%}", flush=True)


def report(result: dict[str, Any], file: Path | None) -> None:
    if hvd.rank() == 0:
        if result["bytes"] is not None:
            print(f"sent {result['bytes'] / 1e6:.2f} MB of gradients", flush=True)
        if file:
            file.write_text(json.dumps(result))


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    hvd.init()
    compression = make_compression(arguments.compression, arguments.bits, arguments.ratio, arguments.seed)
    report(train(compression, arguments.epochs, arguments.seed, print_epoch), arguments.json)


if __name__ == "__main__":
    main()
