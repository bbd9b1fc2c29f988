"""What carries messages between the ranks of a pipeline, and what happens when one of them fails."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from hvd_qsgd.errors import ExchangeError

#: Seconds between two looks at messages under way.
PAUSE = 100e-6
#: How long a failing rank tries to tell the others why.
GRACE_S = 5.0


class StageError(ExchangeError):
    """Another stage has failed; the message is the cause that it gave."""


class Transport(ABC):
    """Point-to-point messages; those between two ranks with one tag arrive in the order they were sent."""

    rank: int
    ranks: int
    #: Seconds after which a message that does not come is an error.
    timeout: float

    @abstractmethod
    def send(self, peer: int, tag: int, message: np.ndarray) -> None:
        """Start to send uint8 data, which must not be changed afterwards."""

    @abstractmethod
    def receive(self, peer: int, tag: int) -> np.ndarray:
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
