"""A pipeline inside one process, to see what compression does to training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.stats import Stats
from hvd_qsgd.pipeline.base import Base, Directions, Loss, cut, evaluating
from hvd_qsgd.pipeline.boundary import Boundary
from hvd_qsgd.pipeline.channel import Settings, check_samples


class SimulatedPipeline(Base, nn.Module):
    """All stages in this process, with the numbers of a real :class:`Pipeline`, bit for bit.

    Layers that draw random numbers (dropout) draw them from this process's generator, where the
    ranks of a real pipeline each have their own.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        forward: Directions = None,
        backward: Directions = None,
        micro_batches: int = 4,
        settings: Settings | None = None,
    ) -> None:
        nn.Module.__init__(self)
        Base.__init__(self, stages, forward, backward, micro_batches)
        layers: list[nn.Module] = [self.stages[0]]
        for number, (pair, stage) in enumerate(zip(self.directions, self.stages[1:])):
            layers += [Boundary(*pair, name=f"boundary{number}", settings=settings), stage]
        self.model = nn.Sequential(*layers)

    @property
    def boundaries(self) -> list[Boundary]:
        return [layer for layer in self.model if isinstance(layer, Boundary)]

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`Pipeline.set_epoch`."""
        for boundary in self.boundaries:
            boundary.set_epoch(epoch)

    def reset(self) -> None:
        """Forget all memories of feedback."""
        for boundary in self.boundaries:
            boundary.reset()

    def stats(self) -> Stats:
        """Bytes that a real pipeline would have sent, by boundary and direction."""
        return Stats({sender.name: sender.stats for boundary in self.boundaries for sender in boundary.senders})

    def train_step(
        self,
        loss: Loss,
        inputs: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        samples: Any = None,
        batch_size: int | None = None,
    ) -> float:
        if inputs is None or targets is None:
            raise ConfigError("All stages are in this process: give inputs= and targets=.")
        size, total = len(inputs), 0.0
        numbers = check_samples(samples, size) if samples is not None else None
        for part in cut(size, self.micro_batches):
            self._place(part.start, numbers[part] if numbers is not None else None)
            value = loss(self.model(inputs[part]), targets[part]) * ((part.stop - part.start) / size)
            value.backward()
            total += float(value.detach())
        return total

    def predict(self, inputs: torch.Tensor | None = None, batch_size: int | None = None) -> torch.Tensor:
        if inputs is None:
            raise ConfigError("All stages are in this process: give inputs=.")
        with torch.no_grad(), evaluating(self.model):
            outputs = []
            for part in cut(len(inputs), self.micro_batches):
                self._place(part.start, None)
                outputs.append(self.model(inputs[part]))
            return torch.cat(outputs)

    def _place(self, first_row: int, samples: np.ndarray | None) -> None:
        for boundary in self.boundaries:
            boundary.first_row, boundary.samples = first_row, samples
