"""A boundary inside one process: what a pipeline would send, decoded on the spot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hvd_qsgd.kernels.torch.untraced import untraced
from hvd_qsgd.pipeline.channel import Received, Receiver, Sender, Settings
from hvd_qsgd.pipeline.direction import Direction, check_pair


class Boundary(torch.nn.Module):
    """Compresses the activation that passes through it, and its gradient on the way back.

    It makes the messages of a real pipeline and decodes them, so the numbers are those of the real
    pipeline, bit for bit. Put it between two layers of any model to see what compression does to training.

    Args:
        forward: compression of activations.
        backward: compression of gradients.
        name: unique in the model; random words depend on it.
        settings: see :class:`hvd_qsgd.pipeline.Settings`.

    In ``eval()`` mode there is no feedback, and a direction compresses if its ``at_inference`` says so.
    Before a batch, set ``first_row`` (of micro-batches) and ``samples`` (for "aq-sgd").
    """

    def __init__(
        self,
        forward: Direction | None = None,
        backward: Direction | None = None,
        name: str = "boundary0",
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.directions = (forward or Direction(), backward or Direction())
        check_pair(*self.directions)
        settings = settings or Settings()
        ends = [(f"{name}.{way}", direction, settings) for way, direction in zip(WAYS, self.directions)]
        self.senders = [Sender(*arguments) for arguments in ends]
        self.receivers = [Receiver(*arguments) for arguments in ends]
        self.first_row = 0
        self.samples: np.ndarray | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0; warm-up ends by it."""
        for sender in self.senders:
            sender.epoch = epoch

    def reset(self) -> None:
        """Forget all memories."""
        for end in (*self.senders, *self.receivers):
            end.reset()

    @untraced
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            # The stage behind a real boundary always sends a gradient.
            x = x.detach().requires_grad_()
        return Crossing.apply(x, self)

    @untraced
    def cross(self, way: int, x: torch.Tensor, place: dict[str, Any], mask: torch.Tensor | None = None) -> Received:
        """One message in the given direction (0 forward, 1 backward), made and decoded."""
        message, _ = self.senders[way].encode(x, mask=mask, **place)
        return self.receivers[way].decode(message, x.device, mask)


WAYS = ("forward", "backward")


class Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, boundary: Boundary) -> torch.Tensor:
        ctx.boundary = boundary
        ctx.place = {"first_row": boundary.first_row, "samples": boundary.samples, "training": boundary.training}
        received = boundary.cross(0, x, ctx.place)
        ctx.mask = received.mask
        return received.tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.boundary.cross(1, gradient, ctx.place, ctx.mask).tensor, None
