"""``exchange="auto"``: measures the network and the machine, then decides; see :mod:`hvd_qsgd.tuning.cost`."""

from __future__ import annotations

import weakref
from typing import Any

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.collectives.base import OfProcessSet
from hvd_qsgd.exchanges.base import Empty
from hvd_qsgd.reduction.progress import run_exchange
from hvd_qsgd.tuning.cost import Costs, Decision, agree_on_largest, decide, measure_costs


class Advisor:
    """Decides. Measures once for each codec's kernels, process set and its size."""

    def __init__(self) -> None:
        #: By process set, not by its id: Horovod gives the id of one that was removed to the next.
        self._costs: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Costs]] = weakref.WeakKeyDictionary()

    def knows(self, kernels: Kernels, collectives: OfProcessSet) -> bool:
        """Whether a decision needs no measurement any more."""
        return (kernels, collectives.ranks) in self._costs.get(collectives.process_set, {})

    def decide(
        self,
        kernels: Kernels,
        collectives: OfProcessSet,
        empty: Empty,
        group: str,
        elements: int,
        bundles: int = 1,
        backward: float | None = None,
    ) -> Decision:
        """The same decision on all ranks, which must all ask at the same point of their program.

        Args:
            kernels: of the codec, on the backend and device that will be used.
            empty: makes the arrays of that backend.
            group: a name of the group of ranks, for collectives.
            elements: what is to be reduced, float32.
            bundles: the number of exchanges it is divided into.
            backward: seconds of backward pass behind which transfers can hide, as seen by this rank;
                None, on all ranks, if there is none.
        """
        name, key = f"{group}.costs", (kernels, collectives.ranks)
        costs = self._costs.setdefault(collectives.process_set, {})
        if key not in costs:
            costs[key] = run_exchange(measure_costs(kernels, collectives.ranks, empty, name), collectives)
        hidden = 0.0
        if backward is not None:
            (hidden,) = run_exchange(agree_on_largest([backward], empty, f"{name}.backward"), collectives)
        return decide(costs[key], kernels.codec, elements, collectives.ranks, bundles, hidden)
