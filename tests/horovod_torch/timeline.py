"""One exchange of two phases. ``test_horovod_torch.py`` starts this with Horovod's timeline on."""

import horovod.torch as hvd
import torch

from hvd_qsgd.torch import QSGDCompressor

hvd.init()
hvd.allreduce(torch.ones(64, 64), name="weight", compression=QSGDCompressor(exchange="scatter_gather"))
hvd.shutdown()
