"""The steps of an optimizer before ``exchange="auto"`` decides; see :mod:`hvd_qsgd.tuning.auto`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

#: Steps of an optimizer before the decision; the first is slow for many reasons, the last is timed.
REHEARSALS = 2


@dataclass
class Rehearsal:
    """The uncompressed steps of an optimizer before the decision."""

    #: Names of gradients that Horovod has not brought back yet.
    under_way: set[str] = field(default_factory=set)
    steps: int = 0
    #: Seconds from the first gradient of the last step to the first that was waited for.
    backward: float = 0.0
    _started: float = 0.0
    _waiting: bool = False

    def takes_off(self, name: str) -> None:
        if not self.under_way or self._waiting:
            self._started, self._waiting = time.perf_counter(), False
        self.under_way.add(name)

    def lands(self, name: str) -> bool:
        """Whether this was the last gradient of the last rehearsal: the network is quiet, and all ranks
        are in ``synchronize()``, so that measuring disturbs nobody."""
        if not self._waiting:
            self.backward, self._waiting = time.perf_counter() - self._started, True
        self.under_way.discard(name)
        self.steps += not self.under_way
        return self.steps == REHEARSALS
