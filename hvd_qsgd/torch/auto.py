"""``exchange="auto"``: measures the network and the machine, then decides; see :mod:`hvd_qsgd.cost`."""

from __future__ import annotations

from typing import Any

import torch

from hvd_qsgd.codecs import Codec
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.cost import Costs, Decision, decide, measure_costs
from hvd_qsgd.engine import run_exchange
from hvd_qsgd.torch.flights import empty_on, kernels_on


class Advisor:
    """Decides for one codec. Measures once for each process set, its size and each device."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._costs: dict[tuple[Any, ...], Costs] = {}

    def decide(self, process_set: Any, device: torch.device, elements: int, bundles: int = 1) -> Decision:
        """The same decision on all ranks, which must all ask at the same point of their program.

        Args:
            elements: what is to be reduced, float32.
            bundles: the number of exchanges it is divided into.
        """
        collectives = HorovodCollectives(process_set)
        key = (process_set.process_set_id, collectives.ranks, device)
        if key not in self._costs:
            name = f"set{process_set.process_set_id}.costs"
            kernels = kernels_on(self._codec, device)
            self._costs[key] = run_exchange(
                measure_costs(kernels, collectives.ranks, empty_on(device), name), collectives
            )
        return decide(self._costs[key], self._codec, elements, collectives.ranks, bundles)
