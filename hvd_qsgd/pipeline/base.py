"""What a pipeline over ranks and one inside a process have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
from torch import nn

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.pipeline.direction import Direction, check_pair

#: (outputs of the last stage, targets) to the mean over the samples.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Directions = Optional[Union[Direction, Sequence[Direction]]]


class Base(ABC):
    """A model in stages, cut batches, and one pair of directions for each boundary."""

    def __init__(
        self, stages: Sequence[nn.Module], forward: Directions, backward: Directions, micro_batches: int
    ) -> None:
        self.stages = list(stages)
        if len(self.stages) < 1:
            raise ConfigError("A pipeline needs one stage at least.")
        self.micro_batches = check_integer("Pipeline", "micro_batches", micro_batches, 1, 2**31)
        cuts = len(self.stages) - 1
        self.directions = list(zip(each(forward, cuts, "forward"), each(backward, cuts, "backward")))
        for pair in self.directions:
            check_pair(*pair)

    @abstractmethod
    def train_step(
        self,
        loss: Loss,
        inputs: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        samples: Any = None,
        batch_size: int | None = None,
    ) -> float | None:
        """Forward and backward through all stages; gradients are added to those of the parameters.

        The batch is cut into ``micro_batches`` parts as equal as can be, or into single samples if it
        is shorter. The sum of the gradients is that of the mean loss over the batch.

        Args:
            loss: from the last stage's output and the targets of a micro-batch, the mean over its samples.
            inputs: the batch for the first stage, shape (samples, ...).
            targets: for the last stage, shape (samples, ...).
            samples: the number of each sample in the data set, for feedback="aq-sgd".
            batch_size: number of samples, where neither inputs nor targets are given.

        Returns:
            The loss on the last stage, None on others.
        """

    @abstractmethod
    def predict(self, inputs: torch.Tensor | None = None, batch_size: int | None = None) -> torch.Tensor | None:
        """The output of the last stage (None on others), in ``eval()`` mode and without gradients."""


class evaluating:  # noqa: N801
    """A block in which a module is in ``eval()`` mode."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = {part: part.training for part in module.modules()}
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *error: object) -> None:
        for part, mode in self.modes.items():
            part.training = mode


def each(given: Directions, cuts: int, name: str) -> list[Direction]:
    """One direction for each boundary."""
    if given is None or isinstance(given, Direction):
        return [given or Direction()] * cuts
    if len(given) != cuts:
        raise ConfigError(f"{name}= has {len(given)} entries for {cuts} boundaries: give one for each, or one for all.")
    return list(given)


def cut(size: int, parts: int) -> list[slice]:
    """``size`` samples in ``parts`` slices as equal as can be, none of them empty."""
    parts = min(parts, size)
    ends = [size * number // parts for number in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


def split(model: nn.Sequential, cuts: Sequence[int]) -> list[nn.Module]:
    """Stages of a Sequential that begin at its layers 0 and ``cuts``.

    Raises:
        ConfigError: the cuts do not ascend inside the model.
    """
    ends = [0, *cuts, len(model)]
    if any(stop <= start for start, stop in zip(ends, ends[1:])):
        raise ConfigError(f"cuts={list(cuts)} must ascend between 1 and {len(model) - 1}: every stage needs a layer.")
    layers = list(model)
    return [nn.Sequential(*layers[start:stop]) for start, stop in zip(ends, ends[1:])]
