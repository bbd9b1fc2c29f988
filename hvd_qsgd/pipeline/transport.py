"""What carries messages between the ranks of a pipeline, and what happens when one of them fails."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from hvd_qsgd.errors import ExchangeError

#: Tags of messages. The first two stand for the direction; the last is for everything else.
ACTIVATION, GRADIENT, CONTROL = range(3)
#: Seconds between two looks at messages under way.
PAUSE = 100e-6
#: How long a failing rank tries to tell the others why.
GRACE_S = 5.0


class StageError(ExchangeError):
    """Another stage has failed; the message is the cause that it gave."""


class Transport(ABC):
    """Point-to-point messages, uint8; those between two ranks with one tag arrive in the order they were sent."""

    rank: int
    ranks: int
    #: Seconds after which a message that does not come is an error.
    timeout: float
    #: That of the stage. Activations and gradients may be received in its memory; messages of control are on the host.
    device = torch.device("cpu")

    @abstractmethod
    def send(self, peer: int, tag: int, message: torch.Tensor) -> None:
        """Start to send bytes, wherever they are, which must not be changed afterwards."""

    @abstractmethod
    def receive(self, peer: int, tag: int) -> torch.Tensor:
        """Wait for the next message from ``peer`` with this tag.

        Raises:
            StageError: another rank has failed.
            ExchangeError: nothing came in time.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything that was sent has left."""

    @abstractmethod
    def abort(self, cause: str) -> None:
        """Tell the other ranks that this one has failed. They raise StageError with the cause."""

    @abstractmethod
    def close(self) -> None:
        """Wait until all ranks have come here."""

    def _await(self, done: Callable[[], bool], what: str) -> None:
        """Return when ``done``, which is called again and again."""
        deadline = time.monotonic() + self.timeout
        while not done():
            if time.monotonic() > deadline:
                raise ExchangeError(
                    f"Rank {self.rank} has waited {self.timeout:g} s {what}. Either that rank is stuck, or the ranks "
                    f"do not call the same methods of the pipeline; if a step takes longer, give a longer timeout."
                )
            time.sleep(PAUSE)
