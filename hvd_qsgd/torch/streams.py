"""A stream of its own on each GPU, on which everything happens that this package does there.

Gradients come from whatever stream the backward pass runs on and go back to whatever stream the
optimizer runs on; messages, residuals and temporary tensors are made, used and freed on one stream only, so that
nothing between two uses of them has to be ordered. What crosses over is a tensor that comes in (:func:`bring`)
or goes back (:func:`hand_back`). Besides, encoding does not stand in line behind the backward pass.

Horovod records its ready event on the stream that is current when a collective is started. That is this
one: the collective waits for the encoding and for nothing else.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch


@functools.cache
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU; made at first use."""
    return torch.cuda.Stream(device)


def on_own_stream(device: torch.device) -> AbstractContextManager[object]:
    """What is done inside goes to the device's own stream, if it is a GPU."""
    return torch.cuda.stream(own_stream(device)) if device.type == "cuda" else nullcontext()


def bring(tensor: torch.Tensor) -> None:
    """Let the own stream use a tensor as the current stream will leave it.

    It is recorded, so that its memory is not given away before the own stream is done with it.
    """
    if tensor.device.type != "cuda":
        return
    own = own_stream(tensor.device)
    own.wait_stream(torch.cuda.current_stream(tensor.device))
    tensor.record_stream(own)


def hand_back(tensor: torch.Tensor) -> None:
    """The inverse of :func:`bring`: let the current stream use what the own stream makes."""
    if tensor.device.type != "cuda":
        return
    current = torch.cuda.current_stream(tensor.device)
    current.wait_stream(own_stream(tensor.device))
    tensor.record_stream(current)
