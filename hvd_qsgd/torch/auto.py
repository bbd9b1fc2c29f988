"""``exchange="auto"``: measures the network and the machine, then decides; see :mod:`hvd_qsgd.cost`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_qsgd.codecs import Codec
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.cost import Costs, Decision, agree_on_largest, decide, measure_costs
from hvd_qsgd.engine import run_exchange
from hvd_qsgd.torch.flights import empty_on, kernels_on

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


class Advisor:
    """Decides. Measures once for each codec, process set and its size, and device."""

    def __init__(self) -> None:
        self._costs: dict[tuple[Any, ...], Costs] = {}

    def decide(
        self,
        codec: Codec,
        process_set: Any,
        device: torch.device,
        elements: int,
        bundles: int = 1,
        backward: float = 0.0,
    ) -> Decision:
        """The same decision on all ranks, which must all ask at the same point of their program.

        Args:
            elements: what is to be reduced, float32.
            bundles: the number of exchanges it is divided into.
            backward: seconds of backward pass behind which transfers can hide, as seen by this rank.
        """
        collectives = HorovodCollectives(process_set)
        name, empty = f"set{process_set.process_set_id}.costs", empty_on(device)
        key = (codec, process_set.process_set_id, collectives.ranks, device)
        if key not in self._costs:
            steps = measure_costs(kernels_on(codec, device), collectives.ranks, empty, name)
            self._costs[key] = run_exchange(steps, collectives)
        (hidden,) = run_exchange(agree_on_largest([backward], empty, f"{name}.backward"), collectives)
        return decide(self._costs[key], codec, elements, collectives.ranks, bundles, hidden)
