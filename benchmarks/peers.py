"""What users would pick instead: PyTorch's DistributedDataParallel with its communication hooks, over Gloo.

PyTorch's PowerSGD hook aborts over Gloo with a size mismatch as soon as gradients travel in more than one bucket, so
it gets one bucket for all, which does not overlap the backward pass. ``powersgd`` 0.0.2 on PyPI, the package of the
paper's authors, contains no code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

#: Of the rendezvous of torch.distributed, on the first host.
PORT = 29611
#: More than all gradients of the benchmarks' models.
ONE_BUCKET_MB = 1024


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


def powersgd(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


HOOKS: tuple[Callable[[Any], None], ...] = (plain, fp16, powersgd)


def wrap(model: torch.nn.Module, hook: Callable[[Any], None]) -> torch.nn.Module:
    """The model with gradients averaged by PyTorch."""
    join()
    settings = {"bucket_cap_mb": ONE_BUCKET_MB} if hook is powersgd else {}
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, **settings)
    hook(wrapped)
    return wrapped
