"""Gradients as what the parts of an exchange want of them: arrays of kernels, room for the mean, carriers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from hvd_qsgd.torch.callsite import CallSite


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values in one row, in its memory if they stand there so."""
    # reshape() alone may give a view with gaps.
    return tensor.detach().reshape(-1).contiguous()


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor as a flat float32 array for the kernels, sharing its memory where it can."""
    values = flat(tensor).to(torch.float32)
    return values.numpy() if values.device.type == "cpu" else values


def scaled(mean: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
    """The mean, multiplied in place by the reduced carrier."""
    with writable(mean):
        if carrier.device.type != "cpu":
            # Looking whether it is 1 would make the host wait for the device.
            return mean.mul_(carrier.view(()).to(torch.float32))
        factor = float(carrier)
        return mean if factor == 1.0 else mean.mul_(factor)


def writable(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Where a tensor of the caller's, perhaps made in ``torch.inference_mode()``, may be written to."""
    return torch.inference_mode(tensor.is_inference())


def put_back(site: CallSite, tensor: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The result as the caller of ``compress`` wants it for a tensor, in its type and shape.

    Horovod's own are in the memory of the gradient, which may be part of a buffer that users clear, scale or clip.
    """
    if site.optimizer is None or overlaps_itself(tensor):
        return result.to(tensor.dtype).view(tensor.shape)
    with writable(tensor):
        tensor.detach().copy_(result.view(tensor.shape))
    return tensor


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory, as in what ``expand()`` makes."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def reducible(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor if Horovod can reduce it, or refuses what it is anyway; else a copy that it can reduce."""
    if tensor.layout != torch.strided:
        return tensor
    return (tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor).contiguous()


def room_for_mean(site: CallSite, tensor: torch.Tensor, source: Any) -> tuple[Any, bool]:
    """An array for the mean of arrays like ``source``, and whether it is the tensor's memory."""
    on_cpu = isinstance(source, np.ndarray)
    # Horovod overwrites the gradient of a parameter anyway; elsewhere the tensor is the user's.
    in_place = site.optimizer is not None and tensor.is_contiguous() and tensor is site.parameter.grad
    if in_place and tensor.dtype == (torch.float32 if on_cpu else source.dtype):
        return (array_of(tensor) if on_cpu else flat(tensor)), True
    # Memory from NumPy comes in huge pages: touching 100 MB from torch for the first time can take 100 ms.
    return (np.empty_like(source) if on_cpu else torch.empty_like(source)), False


#: Of carriers, unlike that of any tensor: Horovod must not take one for what another rank leaves to it.
CARRIER_SHAPE = (1, 1, 1, 1, 1, 1)


def carrier_for(site: CallSite, tensor: torch.Tensor) -> torch.Tensor:
    """What Horovod reduces in place of a tensor: 1.0."""
    if site.grouped:
        # Horovod wants the tensors of a group on one device and of one type.
        dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
        return torch.ones(CARRIER_SHAPE, dtype=dtype, device=tensor.device)
    # On the CPU, so that reading it does not wait for a device; float64 makes 1/n * n exact in float32.
    return torch.ones(CARRIER_SHAPE, dtype=torch.float64, device="cpu")
