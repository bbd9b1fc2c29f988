"""A job whose rank 0 runs torch and whose other ranks run TensorFlow; ``test_horovod_tensorflow.py`` starts it."""

from __future__ import annotations

import os
import sys

import numpy as np

from hvd_qsgd.errors import ExchangeError

SHAPE = (40, 50)


def torch_rank(how: str) -> None:
    import horovod.torch as hvd
    import torch

    from hvd_qsgd.torch import QSGDCompressor

    hvd.init()
    if how == "allreduce":
        hvd.allreduce(torch.ones(SHAPE), name="x", compression=QSGDCompressor)
    else:
        parameter = torch.nn.Parameter(torch.ones(SHAPE))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0), [("w", parameter)], compression=QSGDCompressor
        )
        parameter.sum().backward()
        optimizer.step()


def tensorflow_rank(how: str) -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    from hvd_qsgd.tensorflow import QSGDCompressor

    hvd.init()
    if how == "allreduce":
        hvd.allreduce(tf.ones(SHAPE), name="x", compression=QSGDCompressor)
    else:
        variable = tf.Variable(np.ones(SHAPE, np.float32), name="w")
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable)
        hvd.DistributedGradientTape(tape, compression=QSGDCompressor).gradient(loss, [variable])


def main(how: str) -> None:
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0")))
    try:
        torch_rank(how) if rank == 0 else tensorflow_rank(how)
    except ExchangeError as error:
        print(f"\nREFUSED {error}", flush=True)
        # The other rank may wait for Horovod's farewell.
        os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1])
