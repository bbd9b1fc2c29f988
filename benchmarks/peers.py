"""What users would pick instead: PyTorch's DistributedDataParallel with its communication hooks, over Gloo.

PyTorch's PowerSGD hook is not among them: with more than one bucket, over Gloo, it aborts with a size mismatch, as
it did here with ResNet-50. For PowerSGD there is ``hvd_qsgd.torch.PowerSGDCompressor``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

#: Of the rendezvous of torch.distributed, on the first host.
PORT = 29611


def join() -> None:
    """Make the ranks of this Horovod job a group of torch.distributed."""
    if not dist.is_initialized():
        interface = "eth0" if os.path.exists("/sys/class/net/eth0") else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        address = hvd.broadcast_object(_address(interface), root_rank=0, name="address")
        dist.init_process_group(
            "gloo", f"tcp://{address}:{PORT}", timedelta(seconds=60), world_size=hvd.size(), rank=hvd.rank()
        )


def _address(interface: str) -> str:
    import psutil

    return str(next(a.address for a in psutil.net_if_addrs()[interface] if a.family.name == "AF_INET"))


def plain(model: DistributedDataParallel) -> None:
    """No hook."""


def fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)


HOOKS: tuple[Callable[[Any], None], ...] = (plain, fp16)


def wrap(model: torch.nn.Module, hook: Callable[[Any], None]) -> torch.nn.Module:
    """The model with gradients averaged by PyTorch."""
    join()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    hook(wrapped)
    return wrapped
