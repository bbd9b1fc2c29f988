"""Train a small network on MNIST with Horovod and model.fit of Keras 3.

horovodrun -np 2 python examples/mnist_keras.py --compression qsgd --bits 4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
from mnist_tensorflow import (
    BATCH_SIZE,
    accuracy,
    checksum,
    load_mnist,
    make_compression,
    make_network,
    make_optimizer,
    parse_arguments,
    print_epoch,
    report,
)

from hvd_qsgd.keras import BroadcastGlobalVariablesCallback, Compressor, DistributedOptimizer, MetricAverageCallback


def train(compression: Any, epochs: int, seed: int, on_epoch: Callable[[int, float, float], None]) -> dict[str, Any]:
    """Train from scratch; see :func:`mnist_tensorflow.train`. Losses are those of epochs."""
    keras.utils.set_random_seed(seed)
    (images, digits), test_set = load_mnist()
    model = make_network()
    model.compile(
        DistributedOptimizer(make_optimizer(), compression=compression),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    history = model.fit(
        images[hvd.rank() :: hvd.size()],
        digits[hvd.rank() :: hvd.size()],
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test_set,
        verbose=0,
        callbacks=[
            BroadcastGlobalVariablesCallback(0),
            MetricAverageCallback(),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: on_epoch(epoch + 1, logs["loss"], logs["val_accuracy"])
            ),
        ],
    ).history
    return {
        "losses": history["loss"],
        "accuracy": accuracy(model, test_set),
        "parameters": model.count_params(),
        "bytes": compression.stats().wire_bytes if isinstance(compression, Compressor) else None,
        "checksums": hvd.allgather_object(checksum(model)),
    }


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    hvd.init()
    compression = make_compression(arguments.compression, arguments.bits, arguments.ratio, arguments.seed)
    report(train(compression, arguments.epochs, arguments.seed, print_epoch), arguments.json)


if __name__ == "__main__":
    main()
